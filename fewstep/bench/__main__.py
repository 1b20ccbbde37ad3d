"""The trainer's benchmarks one after the other: python -m fewstep.bench"""

from fewstep.bench import methods, trainer

if __name__ == "__main__":
    trainer.main()
    methods.main()
