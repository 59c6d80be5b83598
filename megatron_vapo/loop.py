"""The training loop, in the order in which the data lives it."""

from __future__ import annotations

from megatron_vapo.algorithm.statistics import explained_variance
from megatron_vapo.interrupt import Interrupt
from megatron_vapo.objectives import monte_carlo_returns, with_advantages
from megatron_vapo.run import Run


def train(run: Run, interrupt: Interrupt) -> bool:
    """Evaluate, pretrain the critic, train with VAPO. False where the run was asked to stop before its end."""
    recipe, progress = run.recipe, run.progress
    if recipe.evaluation.data and progress.accuracy_before is None:
        progress.accuracy_before = run.evaluate()
    if not progress.pretraining_done and not pretrain_critic(run, interrupt):
        return False
    with run.display.phase("train", total=recipe.steps, start=progress.steps) as run.phase:
        while progress.steps < recipe.steps:
            step = progress.steps + 1

            batch = run.rollout("train", step)
            if recipe.uses_critic:
                batch = run.values(batch)
            batch = run.logprobs(batch)
            batch = with_advantages(batch, recipe.algorithm)
            metrics = {}
            if recipe.uses_critic:
                metrics |= run.update_critic(batch, recipe.critic.epochs, step)
            metrics |= run.update_actor(batch, step)
            progress.steps = step
            run.sync_weights()

            run.finish_step("train", step, batch, metrics)
            if recipe.evaluation.data and _due(step, recipe.evaluation.every, recipe.steps):
                progress.accuracy_after = run.evaluate()
            stop = interrupt.requested()
            if stop or _due(step, recipe.checkpoint.every, recipe.steps):
                run.save()
            if stop:
                return False
    return True


def pretrain_critic(run: Run, interrupt: Interrupt) -> bool:
    """Train the critic on rollouts of the fixed policy until it explains them (VC-PPO). False where interrupted."""
    settings, progress = run.recipe.value_pretraining, run.progress
    if run.recipe.uses_critic and settings.enabled and not settings.checkpoint:
        with run.display.phase("value pretraining", settings.max_steps, progress.pretraining_steps) as run.phase:
            explained = False
            while progress.pretraining_steps < settings.max_steps and not explained:
                step = progress.pretraining_steps + 1

                batch = run.rollout("pretrain", step)
                batch = run.values(batch)
                batch = monte_carlo_returns(batch, run.recipe.algorithm.gamma)
                # Judged on rollouts that the critic was not trained on yet.
                explained = explained_variance(batch.values, batch.returns) >= settings.target_explained_variance
                metrics = run.update_critic(batch, settings.epochs, step)
                progress.pretraining_steps = step

                run.finish_step("pretrain", step, batch, metrics)
                # Once explained, pretraining is first concluded: a resumed run could not judge it again.
                if interrupt.requested() and not explained:
                    run.save()
                    return False
        run.save_pretrained_critic()
        if settings.reset_optimizer:
            run.critic.reset_optimizer()
        progress.pretraining_done = True
        run.save()
    elif run.recipe.uses_critic and settings.checkpoint:
        run.load_pretrained_critic(settings.checkpoint)
    progress.pretraining_done = True
    return True


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
