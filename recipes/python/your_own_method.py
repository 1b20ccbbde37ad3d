"""A method of your own: the student draws in one call what the teacher's solver draws in several."""

import torch

import fewstep

WARM_UP, STEPS, BATCH = 30, 30, 128


@fewstep.part("method", "my_method")
class MyMethod:
    """Regress the student's one call on solver steps of the teacher, from the same noise."""

    calls: int = 8
    """Solver steps of the teacher."""

    def needs(self):
        return fewstep.Needs(frozenset({"teacher", "student"}))

    def turns(self, roles, step):
        yield fewstep.Turn(("student",), lambda batch: self.losses(roles, batch))

    def losses(self, roles, batch):
        noise, levels = batch.noise(), torch.linspace(1, 0, self.calls + 1, dtype=torch.float64)
        target = fewstep.solve(roles.teacher, noise, levels, batch.cond)  # a flow: its times are the levels
        yield fewstep.Losses({"regress": fewstep.mse(roles.student(noise, levels[:1].expand(len(batch))).x0, target)})

    def sampler(self):
        return fewstep.Sampler(steps=(1.0,))


if __name__ == "__main__":
    settings = {"method": {"name": "my_method", "calls": 4}, "before.0.steps": WARM_UP}
    trainer = fewstep.Trainer(fewstep.load("toy/cd", settings, train={"steps": STEPS, "batch": BATCH}))
    trainer.fit()
    print(trainer.last_record["regress"])
    print(fewstep.open_product(trainer).draw(4))
