"""The training loop, in the order in which the data lives it."""

from __future__ import annotations

from megatron_vapo.algorithm.statistics import explained_variance
from megatron_vapo.training.objectives import monte_carlo_returns, with_advantages
from megatron_vapo.training.run import Run


def train(run: Run) -> None:
    """Evaluate, pretrain the critic, train with VAPO.

    Raises:
        StopRequested: the run was asked to stop; `run.progress` and the models are as of the last finished step.
    """
    recipe, progress = run.recipe, run.progress
    _evaluate_if_due(run)
    if not progress.pretraining_done:
        pretrain_critic(run)
    with run.display.phase("train", total=recipe.steps, start=progress.steps) as run.phase:
        while not run.over:
            step = progress.steps + 1

            batch = run.rollout("train", step)
            run.interrupt.check()
            if recipe.uses_critic:
                batch = run.values(batch)
            batch = run.logprobs(batch)
            batch = with_advantages(batch, recipe.algorithm)
            run.interrupt.check()  # for the last time: models change from here on
            metrics = {}
            if recipe.uses_critic:
                metrics |= run.update_critic(batch, recipe.critic.epochs, step)
            metrics |= run.update_actor(batch, step)

            run.finish_step("train", step, batch, metrics)
            run.sync_weights()
            _evaluate_if_due(run)
            if _due(step, recipe.checkpoint.every, last=run.over):
                run.save()
            run.settle()
            run.interrupt.check()
    run.save()
    run.settle(wait=True)


def pretrain_critic(run: Run) -> None:
    """Train the critic on rollouts of the fixed policy (VC-PPO), or take one that an earlier run trained.

    Raises:
        StopRequested: as `train`.
    """
    settings, progress = run.recipe.value_pretraining, run.progress
    pretrains = run.recipe.uses_critic and settings.enabled and not settings.checkpoint
    if pretrains:
        with run.display.phase("value pretraining", settings.max_steps, progress.pretraining_steps) as run.phase:
            _pretraining_steps(run)
        run.save_pretrained_critic()
        if settings.reset_optimizer:
            run.critic.reset_optimizer()
    elif run.recipe.uses_critic and settings.checkpoint:
        run.load_pretrained_critic(settings.checkpoint)
    progress.pretraining_done = True
    if pretrains:
        run.save()


def _pretraining_steps(run: Run) -> None:
    settings, progress = run.recipe.value_pretraining, run.progress
    explained = False
    while progress.pretraining_steps < settings.max_steps and not explained:
        step = progress.pretraining_steps + 1

        batch = run.rollout("pretrain", step)
        batch = run.values(batch)
        batch = monte_carlo_returns(batch, run.recipe.algorithm.gamma)
        run.interrupt.check()
        # Judged on rollouts that the critic was not trained on yet.
        explained = explained_variance(batch.values, batch.returns) >= settings.target_explained_variance
        metrics = run.update_critic(batch, settings.epochs, step)

        run.finish_step("pretrain", step, batch, metrics)
        if not explained:  # else pretraining is first concluded: a resumed run could not judge it again
            if _due(step, run.recipe.checkpoint.every, last=step == settings.max_steps):
                run.save()
            run.settle()
            run.interrupt.check()


def _evaluate_if_due(run: Run) -> None:
    """Before training, every so many steps, and after it."""
    settings, step = run.recipe.evaluation, run.progress.steps
    due = step == 0 or _due(step, settings.every, last=run.over)
    if settings.data and due and run.progress.evaluated_at != step:
        run.evaluate()


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
