"""Are the kernels right, and how fast are they? Measures this machine, ours and the others' code.

    python -m bench                        everything at three sizes; with the peers installed
                                           the training steps alone take eight minutes
    python -m bench --parts check          every kernel against float64, seconds
    python -m bench --parts limits,ops     what the machine can do, and each kernel beside it
    python -m bench --parts train,rollout,decode,align --shapes T1     whole tasks

check    each kernel in C against PyTorch in float64, forward and backward, at sizes that divide by
         nothing; generation against model.py. Exit code 1 if anything is off.
limits   multiply-adds in registers, our matrix product, PyTorch's, and the speed of each cache and
         of memory: measured, not read from a data sheet.
ops      each kernel alone: its rate, the share of its limit, and PyTorch's time for the same.
train    a step of pretrain.py; rollout: 64 answers of 64 tokens; decode: one answer, token by
         token; align: steps of sft.py and reward.py and an iteration of ppo.py. Against plain
         PyTorch, and against transformers, trl 1.12.0 and llama-cpp-python where installed.

Times depend on what else the machine does: the first line says how busy it is. Contestants run in
turn, in processes of their own, and only ratios within a round are compared. On a machine that is
never quiet, --threads 1 --clock cpu counts the processor time that each one used instead.

Read ops.py (each kernel, its exact twin, PyTorch's) with bench.c, then __main__.py from check to
op_table; for whole tasks tasks.py (who meets whom), referee.py (turns, clocks, the table), and of
contestants.py the ones that matter to you.
"""
