/* Slurm's proctrack/linuxproc with the signals of proctrack/cgroup, the default, whose control groups a network namespace
 * does not have: every signal but SIGKILL reaches a step's tasks alone, the children of slurmstepd, and none of the
 * processes below them (_slurm_cgroup_is_pid_a_slurm_task in Slurm's proctrack_cgroup.c). While the file WHOLE_TREE is
 * there, signals reach all processes, as proctrack/linuxproc sends them.
 *
 * What is not defined here is found in proctrack_linuxproc.so, with which it is linked.
 */

#include <dirent.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <slurm/slurm.h>

const char plugin_name[] = "Process tracking whose signals reach tasks alone";
const char plugin_type[] = "proctrack/task_only";
const uint32_t plugin_version = SLURM_VERSION_NUMBER;

extern int kill_proc_tree(pid_t top, int number);

static pid_t parent_of(const char *pid)
{
    char path[64];
    int parent = 0;
    snprintf(path, sizeof(path), "/proc/%.20s/stat", pid);
    FILE *file = fopen(path, "r");
    if (file) {
        if (fscanf(file, "%*d (%*[^)]) %*c %d", &parent) != 1)
            parent = 0;
        fclose(file);
    }
    return parent;
}

int proctrack_p_signal(uint64_t id, int number)
{
    if (number == SIGKILL || access(WHOLE_TREE, F_OK) == 0)
        return kill_proc_tree((pid_t) id, number);
    DIR *processes = opendir("/proc");
    if (!processes)
        return SLURM_ERROR;
    for (struct dirent *entry; (entry = readdir(processes));) {
        pid_t pid = atoi(entry->d_name);
        if (pid > 0 && parent_of(entry->d_name) == (pid_t) id)
            kill(pid, number);
    }
    closedir(processes);
    return SLURM_SUCCESS;
}
