"""
Trains a search agent with IGPO: a language model that searches a corpus of passages and answers questions.

    accelerate launch train.py --config configs/hotpotqa_cpu.yaml

`--help` lists all arguments. `igpo train` does the same without this file; on several GPUs use
`accelerate launch -m igpo_trl train`.
"""

from igpo_trl.cli.train import main

if __name__ == "__main__":
    main()
