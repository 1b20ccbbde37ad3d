"""The gradient of distribution matching (DMD, arXiv 2311.18828, eq. 7 and 8) in a training loop of your own."""

import copy

import torch

import fewstep

STEPS, BATCH, SHAPE = 3, 8, (1, 8, 8)

if __name__ == "__main__":
    teacher = fewstep.load_denoiser("assets:digits-teacher").requires_grad_(False)
    student, critic = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    process, norms = teacher.process, []
    move = torch.optim.AdamW(student.parameters(), lr=2e-4)
    follow = torch.optim.AdamW(critic.parameters(), lr=1e-3)
    for step in range(STEPS):
        draws = fewstep.Draws(fewstep.fold("my loop", step), torch.arange(BATCH))
        label = draws.integers(10)
        x = fewstep.rollout(student, draws, SHAPE, (1.0,), label).x
        # The critic learns what the student draws; the difference of the two scores moves the student.
        t = process.grid(draws.uniform())
        loss = fewstep.dsm(critic, x.detach(), t, draws.normal(*SHAPE), label, weight="edm")
        follow.zero_grad()
        loss.backward()
        follow.step()
        with torch.no_grad():
            t = process.grid(0.15 + 0.5 * draws.uniform())
            x_t, _ = fewstep.add_noise(process, x, draws.normal(*SHAPE), t)
            real, fake = teacher(x_t, t, label), critic(x_t, t, label)
            gradient = fewstep.score_difference(fake, real) * fewstep.dmd_normalizer(x, real.x0)
        move.zero_grad()
        fewstep.surrogate_loss(x, gradient).backward()
        move.step()
        norms.append(gradient.norm().item())
        print(f"step {step}  |gradient| {norms[-1]:.3f}  critic {loss.item():.3f}")
