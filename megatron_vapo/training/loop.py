"""The training loop, in the order in which data flows."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from megatron_vapo.checkpoint.pretrained_critic import load_pretrained_critic, save_pretrained_critic
from megatron_vapo.checkpoint.snapshot import RunState
from megatron_vapo.config import ValuePretrainingConfig
from megatron_vapo.training.objectives import monte_carlo_returns, with_advantages
from megatron_vapo.training.run import Run


def train(run: Run) -> None:
    """Evaluate, pretrain the critic, train with VAPO.

    Raises:
        StopRequested: the run was asked to stop; `run.state` and the models are as of the last finished step.
    """
    recipe = run.recipe
    _evaluate_if_due(run)
    if not run.state.pretraining_done:
        pretrain_critic(run)
    with run.display.bar("train", total=recipe.steps, start=run.state.steps):
        while not run.over:
            step = run.state.steps + 1

            rollout = run.rollout("train", step)
            run.interrupt.check()
            batch = run.values(rollout.batch) if recipe.uses_critic else rollout.batch
            batch = run.logprobs(batch)
            batch = run.reference_logprobs(batch) if recipe.uses_reference else batch
            batch = with_advantages(batch, recipe.algorithm)
            run.interrupt.check()  # for the last time: models change from here on
            metrics = run.update_critic(batch, recipe.critic.epochs, step) if recipe.uses_critic else {}
            batch, actor_metrics = run.update_actor(batch, step)

            run.finish_step("train", step, rollout, batch, metrics | actor_metrics)
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
    settings = run.recipe.value_pretraining
    pretrains = run.recipe.uses_critic and settings.enabled and not settings.checkpoint
    if pretrains:
        with run.display.bar("value pretraining", settings.max_steps, run.state.pretraining_steps):
            explained = _pretraining_steps(run)
        if not explained:
            run.display.note(
                f"value pretraining ends after {settings.max_steps} rollouts below its aim, an explained variance of "
                f"{settings.target_explained_variance:g}: see docs/critic.md, or raise value_pretraining.max_steps"
            )
        save_pretrained_critic(run.trainers["critic"], run.folder / "critic_pretrained")
        if settings.reset_optimizer:
            run.trainers["critic"].reset_optimizer()
    elif run.recipe.uses_critic and settings.checkpoint:
        critic = run.trainers["critic"]
        load_pretrained_critic(critic, Path(settings.checkpoint), with_optimizer=not settings.reset_optimizer)
    run.end_pretraining()
    if pretrains:
        run.save()
        run.interrupt.check()  # the last step may have raised an alarm of alarms.stop


def _pretraining_steps(run: Run) -> bool:
    """Return whether rollouts were explained as well as the recipe asks before the bound on steps."""
    settings = run.recipe.value_pretraining
    while not (done := _is_explained(run.state, settings)) and run.state.pretraining_steps < settings.max_steps:
        step = run.state.pretraining_steps + 1

        rollout = run.rollout("pretrain", step)
        batch = run.values(rollout.batch)
        batch = monte_carlo_returns(batch, run.recipe.algorithm.gamma)
        run.interrupt.check()
        metrics = run.update_critic(batch, settings.epochs, step)

        run.finish_step("pretrain", step, rollout, batch, metrics)
        if _due(step, run.recipe.checkpoint.every, last=step == settings.max_steps):
            run.save()
        run.settle()
        run.interrupt.check()
    return done


def _is_explained(state: RunState, settings: ValuePretrainingConfig) -> bool:
    """Return whether the last rollouts, before the critic was trained on them, were explained well enough."""
    judged = state.explained_variances[-settings.judged_rollouts :]
    return len(judged) == settings.judged_rollouts and fmean(judged) >= settings.target_explained_variance


def _evaluate_if_due(run: Run) -> None:
    """Evaluate before training, every so many steps, and after it."""
    settings, step = run.recipe.evaluation, run.state.steps
    due = step == 0 or _due(step, settings.every, last=run.over)
    if settings.data and due and run.state.evaluated_at != step:
        run.evaluate()


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
