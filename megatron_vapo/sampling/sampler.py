"""Turns prompts into scored experience: group sampling on all engines, rewards, dynamic sampling, partial rollouts."""

from __future__ import annotations

import math
import threading
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_vapo.algorithm.advantages import soft_overlong_penalty
from megatron_vapo.config import RewardConfig, RolloutConfig, SamplingConfig
from megatron_vapo.data.exchange import Exchange, Placement, homes
from megatron_vapo.data.experience import Experience, Responses, share_of
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.data.training_prompts import TrainingPrompts
from megatron_vapo.rewards import RewardInput
from megatron_vapo.rewards.scorer import Failures, RewardScorer
from megatron_vapo.rewards.worker import FAILURE_SCORE
from megatron_vapo.rollout import Pause, Request, RolloutEngine
from megatron_vapo.runtime.collectives import any_rank, gather_objects
from megatron_vapo.runtime.signals import stop_together
from megatron_vapo.runtime.work import working
from megatron_vapo.sampling.background import Sampling, here
from megatron_vapo.sampling.failing import ENVIRONMENT, FailureLimit
from megatron_vapo.sampling.seeds import seeds
from megatron_vapo.sampling.trajectory import Group, Sample, Scored, Tokens, trained_marks
from megatron_vapo.sampling.turns import Episode, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Settle = Callable[[Group, Sample], None]
"""Scores a response if it is finished, and ends the round once enough groups are complete."""


class Sampler:
    """Samples with a run's engine, tokenizer and reward. All processes call every method; those that have an engine
    write a share of the groups, and keep its tokens and text. All know how long the responses are, and their scores.

    Args:
        refresh: gives all engines the present weights again, after one of them failed.
        overdue: whether responses under way should be abandoned; then all processes raise StopRequested.
        turns: answers the turns of responses, where there is an environment.

    Close it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        engine: RolloutEngine,
        scorer: RewardScorer,
        seed: int,
        rollout: RolloutConfig,
        reward: RewardConfig,
        refresh: Callable[[], None],
        overdue: Callable[[], bool] = lambda: False,
        turns: Turns | None = None,
    ) -> None:
        self.engine, self.scorer, self.seed, self.refresh, self._overdue = engine, scorer, seed, refresh, overdue
        self.unfinished: list[Group] = []
        """What earlier steps began and did not need (rollout.partial); the same on all processes."""
        self.on_tokens: Callable[[int], None] = lambda count: None
        self._tokenizer, self._rollout, self._reward = tokenizer, rollout, reward
        self._failures, self._limit = (0, 0), FailureLimit(reward.failing_share)
        self._counts: Counter[str] = Counter()
        self._turns = turns
        self._settling = threading.RLock()
        """Held by the one of several threads that takes in a response."""

    def close(self) -> None:
        """End the processes of rewards and environment."""
        self.scorer.close()
        if self._turns is not None:
            self._turns.close()

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        purpose: str,
        step: int,
        sampling: SamplingConfig,
    ) -> list[Scored]:
        """Return `samples` scored responses to each prompt, those of a prompt one after another. Each process has the
        tokens and the text of those that it holds."""
        groups = self._begin(prompts, samples, purpose, step)
        here(self._write(groups, sampling, quota=None))
        self._judge_failures()
        return [sample.result for group in groups for sample in group.samples]

    def experience(
        self, prompts: TrainingPrompts, purpose: str, step: int
    ) -> Sampling[tuple[Experience, list[tuple[Prompt, Scored]]]]:
        """Sample the responses of one step as experience, at their homes, and each of them with its prompt, as they
        were written: tokens and text are where the engine is. With rollout.window_tokens the batch holds unfinished
        ones too, which have no score and are not among the second."""
        if purpose == "train" and self._rollout.window_tokens is not None:
            return (yield from self._windows(prompts, step, self._rollout.window_tokens))
        settings = self._rollout
        count, samples = settings.prompts_per_step, settings.samples_per_prompt
        kept: list[Group] = []
        passed_over: list[Group] = []
        rounds = settings.dynamic_sampling_rounds if settings.dynamic_sampling else 1
        trained_at = step - 1 if purpose == "train" else self.engine.version
        carried, self.unfinished = self._young_enough(self.unfinished, trained_at), []
        sampled = -sum(group.tokens for group in carried)
        for number in range(rounds):
            missing = count - len(kept)
            fresh = prompts.take(max(0, math.ceil(settings.over_sampling * missing) - len(carried)))
            groups = carried + self._begin(fresh, samples, purpose, step * rounds + number)
            carried, open_ = [], [group for group in groups if not group.complete]
            yield from self._write(groups, settings.sampling, quota=missing if len(groups) > missing else None)
            prompts.update((group.prompt, group.outcomes) for group in open_ if group.complete)
            sampled += sum(group.tokens for group in groups)
            for group in groups:
                taught = not settings.dynamic_sampling or (group.complete and group.teaches)
                (self.unfinished if not group.complete else kept if taught else passed_over).append(group)
            if len(kept) >= count:
                break
        self._judge_failures()
        # Short of groups after the last round, others keep the batch its size; only a length penalty can teach there.
        chosen = (kept + passed_over)[:count]
        self.unfinished = self.unfinished + kept[count:] if settings.partial else []
        self._count("rollout/sampled_tokens", sampled)
        written = [(group.prompt, sample) for group in chosen for sample in group.samples]
        places = torch.arange(len(written)) // samples
        return self._pack(written, places), [(prompt, sample.result) for prompt, sample in written]

    def _windows(
        self, prompts: TrainingPrompts, step: int, window: int
    ) -> Sampling[tuple[Experience, list[tuple[Prompt, Scored]]]]:
        """Write a window of each of a step's responses: of unfinished ones first, then of new ones in their place."""
        settings = self._rollout
        count, samples = settings.prompts_per_step * settings.samples_per_prompt, settings.samples_per_prompt
        carried, self.unfinished = self.unfinished, []
        free = max(0, count - sum(len(group.samples) for group in carried))
        groups = carried + self._begin(prompts.take(math.ceil(free / samples)), samples, "train", step)
        places = [(place, group, sample) for place, group in enumerate(groups) for sample in group.samples]
        now, later = places[:count], places[count:]  # those that have begun are among the first
        starts = [sample.length for _, _, sample in now]
        for start, (_, _, sample) in zip(starts, now, strict=True):
            sample.until = start + window if start + window < settings.max_response_tokens else None
        for _, _, sample in later:
            sample.until = 0
        yield from self._write(groups, settings.sampling, quota=None)
        prompts.update((group.prompt, group.outcomes) for group in groups if group.outcomes)
        self._judge_failures()
        self._count("rollout/sampled_tokens", sum(sample.length for _, _, sample in now) - sum(starts))
        written = [(group.prompt, sample) for _, group, sample in now]
        batch = self._pack(written, torch.tensor([place for place, _, _ in now]), torch.tensor(starts))
        rows = [(prompt, sample.result) for prompt, sample in written if sample.finished]
        left = [Group(group.index, group.prompt, [s for s in group.samples if not s.finished]) for group in groups]
        self.unfinished = [group for group in left if group.samples]
        return batch, rows

    def metrics(self) -> dict[str, float]:
        """Return counts since the last call, over all processes."""
        mine, self._counts = dict(self._counts), Counter()
        total: Counter[str] = Counter()
        for counts in gather_objects(self.engine.metrics() | mine):
            total.update(counts)
        asked = total.pop("rollout/prompt_tokens", 0)
        cached = total.pop("rollout/cached_prompt_tokens", 0)
        carried = {"rollout/unfinished_groups": float(len(self.unfinished))} if self._rollout.partial else {}
        return dict(total) | ({"rollout/cached_prompt_share": cached / asked} if asked else {}) | carried

    def new_failures(self) -> tuple[int, int]:
        """Return how many rewards of all processes raised, and how many timed out, since the last call."""
        new, self._failures = self._failures, (0, 0)
        return new

    def _judge_failures(self) -> None:
        """Count the failures of all processes; raise RewardError on all where there are too many."""
        total: dict[str, Failures] = {}
        environment = {} if self._turns is None else {ENVIRONMENT: self._turns.take_failures()}
        for failures in gather_objects(self.scorer.take_failures() | environment):
            for name, one in failures.items():
                total[name] = total.get(name, Failures()) + one
        self._failures = (
            self._failures[0] + sum(one.raised for one in total.values()),
            self._failures[1] + sum(one.timed_out for one in total.values()),
        )
        self._limit.check(total)

    def _begin(self, prompts: Sequence[Prompt], samples: int, purpose: str, step: int) -> list[Group]:
        drawn = iter(seeds(self.seed, purpose, step, len(prompts) * samples))
        return [Group(prompt.index, prompt, [Sample(next(drawn)) for _ in range(samples)]) for prompt in prompts]

    def _young_enough(self, groups: list[Group], trained_at: int) -> list[Group]:
        """Return carried groups; responses in them that too old weights began are begun anew.

        Args:
            trained_at: the version of the actor that will be trained on them.
        """
        oldest = trained_at - self._rollout.max_version_lag
        for group in groups:
            for sample in group.samples:
                if sample.begun is not None and sample.begun.weight_version < oldest:
                    sample.start_over()
                    self._count("rollout/discarded", 1)
        return groups

    def _count(self, name: str, number: int) -> None:
        """Count what all processes see alike: `metrics` adds up the counts of all."""
        if self.engine.index is not None and self.engine.index.engine == 0:
            self._counts[name] += number

    def _write(self, groups: list[Group], sampling: SamplingConfig, quota: int | None) -> Sampling[None]:
        """Finish all groups, or, with a quota, at least so many. Engines share them by whole groups: the samples of one
        have a common prefix."""
        index = self.engine.index
        mine = groups[index.engine :: index.engines] if index else []
        self._hand_over(groups)
        enough = len(range(index.engine, quota, index.engines)) if index and quota is not None else len(mine)
        while True:
            yield partial(self._ask, mine, sampling, enough)
            stop_together(self._overdue())
            if any_rank(self.engine.failure is not None):
                self.refresh()
            elif not any_rank(sum(group.complete for group in mine) < enough):
                break  # else the engine failed and was started again meanwhile
        begun = [sample for group in mine for sample in group.samples if sample.score is not None]
        self._finish_scores(begun)
        self._report(groups, mine)

    def _finish_scores(self, samples: list[Sample]) -> None:
        """Wait for the rewards, but not beyond the grace of a run that is to stop: one may take long."""
        begun = [sample.score for sample in samples if sample.score is not None]
        self.scorer.wait(begun, self._overdue)
        stop_together(self._overdue())
        for sample, score in zip(samples, self.scorer.finish(begun), strict=True):
            known = sample.result
            score = score._replace(added=score.added + known.added, parts=score.parts | known.parts)
            sample.scored, sample.score = replace(known, **score._asdict()), None

    def _ask(self, groups: list[Group], sampling: SamplingConfig, enough: int) -> None:
        """Ask the engine for what is missing, until so many groups are complete, the time is over or it fails."""
        open_ = [(group, sample) for group in groups for sample in group.samples if sample.due]
        complete = sum(group.complete for group in groups)
        if complete >= enough or not open_:
            return
        requests = [sample.request(group.prompt) for group, sample in open_]
        longest = self._rollout.max_response_tokens

        def settle(group: Group, sample: Sample) -> None:
            nonlocal complete
            if not sample.due:
                if sample.finished:
                    self._score(group.prompt, sample)
                complete += group.complete
                if complete >= enough and enough < len(groups):
                    self.engine.abort()

        follow = partial(self._follow, open_, settle)
        with self._time_limit() as over, working():
            for number, response in self.engine.generate(requests, sampling, longest, self.on_tokens, follow):
                group, sample = open_[number]
                with self._settling:
                    sample.take(response)
                    if self._turns is not None and response.finish_reason == "stop":
                        self._turns.begin(group.prompt, sample)
                    settle(group, sample)
        self._finish_turns(open_, settle)
        if over.is_set() and self.engine.failure is None:
            incomplete = [group for group in groups if not group.complete]
            self._cut_short(incomplete[: max(0, enough - len(groups) + len(incomplete))], sampling)

    def _follow(self, open_: list[tuple[Group, Sample]], settle: Settle, number: int) -> Pause | None:
        """Return what follows a response of the engine: the next turn, once the environment has answered."""
        group, sample = open_[number]
        step = sample.episode.step
        return None if step is None else Pause(step, partial(self._next_turn, group, sample, settle))

    def _next_turn(self, group: Group, sample: Sample, settle: Settle) -> Request | None:
        assert self._turns is not None, "only an environment answers"
        with self._settling:
            self._turns.finish(group.prompt, sample)
            settle(group, sample)
        return None if sample.finished else sample.request(group.prompt)

    def _finish_turns(self, open_: list[tuple[Group, Sample]], settle: Settle) -> None:
        """Take in what the environment answers to turns that the engine was not asked to go on after."""
        if self._turns is None:
            return
        self._turns.wait((sample for _, sample in open_), self._overdue)
        for group, sample in open_:
            if sample.episode.step is not None and sample.episode.step.done():
                self._next_turn(group, sample, settle)

    @contextmanager
    def _time_limit(self) -> Iterator[threading.Event]:
        """Abort the engine after rollout.step_seconds; yield the event that is set then."""
        over = threading.Event()

        def end() -> None:
            over.set()
            self.engine.abort()

        timer = threading.Timer(self._rollout.step_seconds or 0, end)
        if self._rollout.step_seconds is not None:
            timer.start()
        try:
            yield over
        finally:
            timer.cancel()
            if timer.is_alive():  # an abort that came later would end what is asked next
                timer.join()

    def _cut_short(self, groups: list[Group], sampling: SamplingConfig) -> None:
        """Truncate, once the time is over, responses where they are, and those not begun after their first token."""
        unfinished = [(group, sample) for group in groups for sample in group.samples if not sample.finished]
        unbegun = [(group, sample) for group, sample in unfinished if sample.begun is None]
        requests = [sample.request(group.prompt) for group, sample in unbegun]
        with working():
            for number, response in self.engine.generate(requests, sampling, 1, self.on_tokens):
                sample = unbegun[number][1]
                sample.take(response)
                if self._turns is not None and response.finish_reason == "stop":
                    sample.end("length")  # a turn that nothing answers any more
        for group, sample in unfinished:
            sample.truncate()
            if sample.finished:  # all, unless the engine failed
                self._score(group.prompt, sample)

    def _score(self, prompt: Prompt, sample: Sample) -> None:
        """Begin to score a finished response.

        The end token is no part of the text, whether or not the tokenizer counts it among its special tokens.
        """
        response = sample.written
        ended = response.finish_reason == "stop"
        written = response.token_ids[:-1] if ended else response.token_ids
        text = str(self._tokenizer.decode(written, skip_special_tokens=True))
        sample.scored = Scored(response, text, FAILURE_SCORE)  # until the rewards are there
        turns: tuple[str, ...] = ()
        if self._turns is not None:
            turns, episode = self._turns.texts(sample), sample.episode
            sample.scored = Scored(response, "\n".join(turns), FAILURE_SCORE, episode.reward, episode.parts)
        if sample.episode.failed:
            return
        sample.score = self.scorer.begin(
            RewardInput(
                prompt=prompt.text,
                response=turns[-1] if turns else text,
                answer=prompt.answer,
                row=prompt.row,
                prompt_tokens=len(prompt.token_ids),
                response_tokens=len(response.token_ids) - sample.observed,
                finish_reason=response.finish_reason,
                source=prompt.source,
                turns=turns,
            )
        )

    def _report(self, groups: list[Group], mine: list[Group]) -> None:
        """Let all processes know what each one's engine wrote; tokens and text stay where they are."""
        known = [[sample.known if sample.held else None for sample in group.samples] for group in mine]
        for rank, (index, written) in enumerate(gather_objects((self.engine.index, known))):
            share = groups[index.engine :: index.engines] if index else []
            for group, of_group in zip(share, written, strict=True):
                for sample, of_sample in zip(group.samples, of_group, strict=True):
                    if of_sample is not None:
                        sample.learn(of_sample, rank)

    def _hand_over(self, groups: list[Group]) -> None:
        """Give what earlier steps wrote of unfinished responses to the processes whose engines go on with them."""
        begun = [
            (number, sample)
            for number, group in enumerate(groups)
            for sample in group.samples
            if sample.begun is not None and not sample.finished
        ]
        if not begun:
            return
        ranks = {index: rank for rank, index in enumerate(gather_objects(self.engine.index)) if index}
        by_engine = [ranks[index] for index in sorted(ranks)]
        wanted = Placement.by_rank(torch.tensor([by_engine[number % len(by_engine)] for number, _ in begun]))
        moved = _moved([sample for _, sample in begun], wanted, versions=True)
        arrived = dict(zip(wanted.mine.tolist(), moved, strict=True))
        episodes = {place: sample.episode.packed() for place, (_, sample) in enumerate(begun) if sample.held}
        everyones = {} if self._turns is None else dict(ChainMap(*gather_objects(episodes)))
        for place, rank in zip(wanted.responses.tolist(), wanted.ranks.tolist(), strict=True):
            sample = begun[place][1]
            sample.move(rank, arrived.get(place))
            if place in arrived and place in everyones:
                sample.episode = Episode.unpacked(everyones[place])

    def _pack(self, rows: list[tuple[Prompt, Sample]], groups: Tensor, starts: Tensor | None = None) -> Experience:
        """Return responses as a batch.

        Args:
            groups: [B] int64, equal for the samples of one prompt.
            starts: [B] int64, the tokens that earlier steps wrote; None: none.
        """
        responses = [sample.written for _, sample in rows]
        lengths = torch.tensor([len(r.token_ids) for r in responses])
        trained_lengths = lengths - torch.tensor([sample.observed for _, sample in rows])
        unfinished = torch.tensor([not sample.finished for _, sample in rows])
        scores = [(s.result.outcome, s.result.added) if s.finished else (0.0, 0.0) for _, s in rows]
        outcomes, added = torch.tensor(scores, dtype=torch.float32).unbind(1)
        rewards = outcomes + added
        cache = self._reward.overlong.cache_tokens
        if cache:
            penalty = soft_overlong_penalty(trained_lengths, self._rollout.max_response_tokens, cache)
            rewards = torch.where(unfinished, 0.0, rewards + penalty)
        whole = Responses(
            prompt_lengths=torch.tensor([len(prompt.token_ids) for prompt, _ in rows]),
            response_lengths=lengths,
            trained_lengths=None if torch.equal(trained_lengths, lengths) else trained_lengths,
            groups=groups,
            truncated=torch.tensor([r.finish_reason == "length" for r in responses]),
            outcomes=outcomes,
            rewards=rewards,
            weight_versions=torch.tensor([r.weight_version for r in responses]),
            unfinished=unfinished if unfinished.any() else None,
            window_starts=starts if starts is not None and starts.any() else None,
        )
        home = homes(whole.sequence_lengths)
        spans = self._rollout.spans_versions
        written = _moved([sample for _, sample in rows], home, versions=spans, rewards=self._turns is not None)
        tokens = [torch.empty(0, dtype=torch.int64)]
        for i, one in zip(home.mine.tolist(), written, strict=True):
            tokens += torch.tensor(rows[i][0].token_ids), one.token_ids
        ragged = {
            "tokens": torch.cat(tokens),
            "rollout_logprobs": torch.cat([torch.empty(0), *(one.logprobs for one in written)]),
        }
        if whole.trained_lengths is not None:
            trained = [one.trained for one in written if one.trained is not None]  # each has them
            ragged["trained"] = torch.cat([torch.empty(0, dtype=torch.bool), *trained])
        if spans:
            versions = [one.versions for one in written if one.versions is not None]  # each has them
            ragged["token_versions"] = torch.cat([torch.empty(0, dtype=torch.int32), *versions])
        if self._turns is not None:
            token_rewards = [one.token_rewards for one in written if one.token_rewards is not None]  # each has them
            ragged["token_rewards"] = torch.cat([torch.empty(0), *token_rewards])
        return share_of(whole, home, ragged)


def _moved(samples: list[Sample], wanted: Placement, versions: bool, rewards: bool = False) -> list[Tokens]:
    """Return what is written of the responses that this process is to get, from their holders.

    Args:
        versions: with the weights that wrote each token.
        rewards: with the environment's rewards.
    """
    lengths = torch.tensor([len(sample.written.token_ids) for sample in samples])
    held = Placement.by_rank(torch.tensor([sample.holder for sample in samples]))
    exchange = Exchange(held, wanted)
    mine = [samples[i].written for i in held.mine.tolist()]
    sizes = lengths[wanted.mine].tolist()
    tokens = exchange(torch.cat([torch.empty(0, dtype=torch.int64), *(r.token_ids for r in mine)]), lengths)
    logprobs = exchange(torch.cat([torch.empty(0), *(r.logprobs for r in mine)]), lengths)
    trained: Sequence[Tensor | None] = [None] * len(sizes)
    if any(sample.observed for sample in samples):
        marks = torch.cat([torch.empty(0, dtype=torch.bool), *map(trained_marks, mine)])
        trained = exchange(marks, lengths).split(sizes)
    token_versions: Sequence[Tensor | None] = [None] * len(sizes)
    if versions:
        of_tokens = torch.cat([torch.empty(0, dtype=torch.int32), *(r.token_versions for r in mine)])
        token_versions = exchange(of_tokens, lengths).split(sizes)
    token_rewards: Sequence[Tensor | None] = [None] * len(sizes)
    if rewards:
        of_turns = [samples[i].episode.token_rewards(len(r.token_ids)) for i, r in zip(held.mine.tolist(), mine)]
        token_rewards = exchange(torch.cat([torch.empty(0), *of_turns]), lengths).split(sizes)
    return list(map(Tokens, tokens.split(sizes), logprobs.split(sizes), trained, token_versions, token_rewards))
