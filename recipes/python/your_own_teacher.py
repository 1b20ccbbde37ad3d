"""A teacher of your own, a torch module that is in no diffusers folder, distilled to one step."""

import torch

import fewstep

WARM_UP, STEPS, BATCH = 20, 20, 128


class MyNetwork(torch.nn.Module):
    """Predicts the velocity eps - x0 of the flow x_t = (1 - t) x0 + t eps."""

    def forward(self, points, time):
        x0 = 1.25 * torch.nn.functional.normalize(points, dim=1)
        return (points - x0) / time.float()[:, None].clamp_min(1e-3)


def build():
    """What `factory` names; load your weights here."""
    return MyNetwork()


if __name__ == "__main__":
    teacher = {
        "name": "module",
        "factory": f"{__file__}:build",
        "arguments": {"x": "points", "time": "time"},
        "prediction": "velocity",
        "time_input": "t",
        "process": fewstep.Flow(),
    }
    settings = {"teacher": teacher, "before.0.steps": WARM_UP}
    trainer = fewstep.Trainer(fewstep.load("toy/cd", settings, train={"steps": STEPS, "batch": BATCH}))
    trainer.fit()
    student = fewstep.open_product(trainer)
    print(student.draw(4))
