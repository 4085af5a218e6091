"""Plan the GPU memory that fine-tuning a model needs, before anybody pays for GPUs.

    python launch/plan.py --model facebook/opt-66b --gpus 8 --gpu_memory 80

reads no weights and asks no hub; ``--help`` lists the arguments.
"""

from addax_ds.cli.plan import main

if __name__ == "__main__":
    main()
