"""Cost of a step over ranks, sizes, lengths and methods, and its projection to more of them.

`cli` is the command of ``launch/scaling.py``. `runner` starts each point (`point`) as processes of
its own, which run `measure`: real trainers, whose phases (`phases`) and collectives
(`studies.collectives`) are watched by `instruments`. `projection` is arithmetic over what was
measured, `results` and `figures` write both down.
"""
