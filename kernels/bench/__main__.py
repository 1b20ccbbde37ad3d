"""All benchmarks, then the table: python -m fewstep.kernels.bench"""

from fewstep.kernels.bench import attention, ema, table

if __name__ == "__main__":
    attention.main()
    ema.main()
    table.main()
