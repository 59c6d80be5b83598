"""The paper's Table 1 in miniature; `python -m benchmarks.table1 --help`, docs/table1.md.

arms.py         what is compared, and what the paper measured
sweep.py        runs arms x seeds through the command line, each a run folder
processes.py    its child processes: low priority, logged, stopped together
pieces.py       what the arms of a seed share: base, reward model, pretrained critic
tuning.py       the actor's learning rate of each family of arms, chosen on other seeds
results.py      run folders -> curves and scores
statistics.py   tests and intervals
analysis.py     scores -> every number of the table
figures.py      its figures
document.py     its Markdown
"""
