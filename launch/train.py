"""Fine-tune a causal language model with Addax.

    deepspeed launch/train.py --deepspeed ds_configs/zero3.json

runs the demo; ``--help`` lists the arguments.
"""

from addax_ds.cli.train import main

if __name__ == "__main__":
    main()
