/* A stand-in for pyxis (github.com/NVIDIA/pyxis), Slurm's plugin for containers, for tests on a machine without enroot.
 *
 * It takes pyxis' options with pyxis' rules for their values. The "image" must be a file; nothing is read from it. Its
 * root is the machine's own with an empty /tmp, in which only what is mounted appears: a job whose data lie there finds
 * what its mounts name and nothing else. Tasks see the options as STAND_IN_IMAGE, STAND_IN_MOUNTS, STAND_IN_WORKDIR.
 *
 *     gcc -shared -fPIC -o pyxis_stand_in.so pyxis_stand_in.c
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(pyxis_stand_in, 1)

enum { IMAGE, MOUNTS, WORKDIR, OPTIONS };
static const char *values[OPTIONS];
static const char *names[OPTIONS] = {"STAND_IN_IMAGE", "STAND_IN_MOUNTS", "STAND_IN_WORKDIR"};

static int take(int which, const char *value, int remote)
{
	if (value == NULL || *value == '\0') {
		slurm_error("pyxis stand-in: argument required");
		return -1;
	}
	if (values[which] != NULL && strcmp(values[which], value) != 0) {
		slurm_error("pyxis stand-in: option specified multiple times");
		return -1;
	}
	values[which] = strdup(value);
	return 0;
}

static int ignore(int which, const char *value, int remote)
{
	return 0;
}

static struct spank_option options[] = {
	{"container-image", "[USER@][REGISTRY#]IMAGE[:TAG]|PATH", "[pyxis stand-in] the image", 1, IMAGE, take},
	{"container-mounts", "SRC:DST[:FLAGS][,SRC:DST...]", "[pyxis stand-in] bind mounts", 1, MOUNTS, take},
	{"container-workdir", "PATH", "[pyxis stand-in] working directory inside", 1, WORKDIR, take},
	{"container-name", "NAME", "[pyxis stand-in] ignored", 1, 0, ignore},
	{"container-save", "PATH", "[pyxis stand-in] ignored", 1, 0, ignore},
	{"container-mount-home", NULL, "[pyxis stand-in] ignored", 0, 1, ignore},
	{"no-container-mount-home", NULL, "[pyxis stand-in] ignored", 0, 0, ignore},
	{"container-remap-root", NULL, "[pyxis stand-in] ignored", 0, 1, ignore},
	{"no-container-remap-root", NULL, "[pyxis stand-in] ignored", 0, 0, ignore},
	{"container-entrypoint", NULL, "[pyxis stand-in] ignored", 0, 1, ignore},
	{"no-container-entrypoint", NULL, "[pyxis stand-in] ignored", 0, 0, ignore},
	{"container-writable", NULL, "[pyxis stand-in] ignored", 0, 1, ignore},
	{"container-readonly", NULL, "[pyxis stand-in] ignored", 0, 0, ignore},
	{"container-env", "NAME[,NAME...]", "[pyxis stand-in] ignored", 1, 0, ignore},
	SPANK_OPTIONS_TABLE_END,
};

int slurm_spank_init(spank_t sp, int ac, char **av)
{
	if (spank_context() != S_CTX_LOCAL && spank_context() != S_CTX_REMOTE)
		return 0;
	for (struct spank_option *option = options; option->name != NULL; ++option)
		if (spank_option_register(sp, option) != ESPANK_SUCCESS)
			return -1;
	return 0;
}

static int failed(const char *what, const char *where)
{
	slurm_error("pyxis stand-in: %s: %s: %s", what, where, strerror(errno));
	return -1;
}

static void make_folders(const char *path)
{
	char *copy = strdup(path);
	for (char *slash = strchr(copy + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
		*slash = '\0';
		mkdir(copy, 0755);
		*slash = '/';
	}
	mkdir(copy, 0755);
	free(copy);
}

/* One mount, SRC[:DST[:FLAGS]]; its source was opened before /tmp was hidden. */
struct bind {
	char *target;
	int source;
};

static int open_source(char *text, struct bind *bind)
{
	char *source = strsep(&text, ":");
	bind->target = text != NULL ? strsep(&text, ":") : source;
	if (strspn(source, "./") == 0 || strspn(bind->target, "./") == 0) {
		slurm_error("pyxis stand-in: a mount's paths must be relative or absolute: %s", source);
		return -1;
	}
	bind->source = open(source, O_PATH | O_CLOEXEC);
	return bind->source < 0 ? failed("mount source", source) : 0;
}

static int bind_all(struct bind *binds, int count)
{
	char from[64];
	for (int i = 0; i < count; ++i) {
		make_folders(binds[i].target);
		snprintf(from, sizeof(from), "/proc/self/fd/%d", binds[i].source);
		if (mount(from, binds[i].target, NULL, MS_BIND | MS_REC, NULL) < 0)
			return failed("mount", binds[i].target);
		close(binds[i].source);
	}
	return 0;
}

static int enter(void)
{
	struct bind binds[32];
	int count = 0;
	char *mounts = values[MOUNTS] != NULL ? strdup(values[MOUNTS]) : NULL, *text;

	if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		return failed("mount namespace", "/");
	if (access(values[IMAGE], R_OK) < 0)
		return failed("image", values[IMAGE]);
	while (count < 32 && (text = strsep(&mounts, ",")) != NULL)
		if (open_source(text, &binds[count++]) < 0)
			return -1;
	if (mount("tmpfs", "/tmp", "tmpfs", 0, NULL) < 0)
		return failed("mount", "/tmp");
	if (bind_all(binds, count) < 0)
		return -1;
	if (chdir(values[WORKDIR] != NULL ? values[WORKDIR] : "/") < 0)
		return failed("container-workdir", values[WORKDIR]);
	return 0;
}

int slurm_spank_task_init(spank_t sp, int ac, char **av)
{
	if (values[IMAGE] == NULL)
		return 0;
	for (int i = 0; i < OPTIONS; ++i)
		if (values[i] != NULL)
			spank_setenv(sp, names[i], values[i], 1);
	return enter();
}
