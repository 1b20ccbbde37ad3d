"""Train from Python: a recipe with settings of yours, a look at it on the way, then draw and measure."""

import fewstep

RUN, WARM_UP, STEPS, BATCH, SAMPLES = "runs/train-in-python", 60, 40, 128, 500


def look(trainer):
    """Called after every step; `trainer.roles`, `trainer.progress` and `trainer.last_record` tell the rest."""
    if trainer.progress.done % 20 == 0:
        print(trainer.progress.done, trainer.last_record)


if __name__ == "__main__":
    recipe = fewstep.load(
        "toy/dmd2",
        {"before.0.steps": WARM_UP, "method.critic.steps": 1},
        train={"steps": STEPS, "batch": BATCH, "ema": [0.9], "log_every": 20},
    )
    trainer = fewstep.Trainer(recipe, RUN, hooks=fewstep.Hooks(on_step=look))
    trainer.resume()  # goes on where an earlier call was stopped
    trainer.fit()
    student = fewstep.open_product(RUN)
    print(student.draw(4, seed=0))
    print(student.evaluate(samples=SAMPLES).metrics)
    # Of pictures also student.evaluate(against="my/pictures") and student.export("exported").
