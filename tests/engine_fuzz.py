"""Random traffic through a real engine, every token checked against the oracle.

An `Arena` is an engine with a chunk size and a cache drawn from its seed, mostly too small for its
requests. Scenarios follow each other in it: requests with shared prompts arrive at any step, some
are aborted, all others run to their end. Before each scenario, memory that nobody may read is NaN.

A failure names the seeds; `Arena(seed, model)` and `Arena.scenario(seed)` replay it.
"""

import random
from collections import Counter
from contextlib import contextmanager

from engines import engine
from mask_samples import random_mask
from oracle import Oracle
from speculation import watch
from vllm import SamplingParams

SINK, RECENT = 32, 64
MAX_LENGTH = 512
KEPT = ([0, 32, 16, 48], [64, 16], [0, 0, 32])
EDGES = (1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 191, 192, 193, 256, 300)


class Arena:
    """One engine, and the oracle of its mask."""

    def __init__(self, seed, running, oracle):
        self.seed, self.running, self.oracle = seed, running, oracle
        chance = random.Random(seed)
        self.documents = [[chance.randrange(512) for _ in range(320)] for _ in range(3)]
        self.names = 0
        self.counts = {"finished": 0, "aborted": 0, "tokens": 0}

    def scenario(self, seed):
        """Some requests, from the first arrival to an empty engine."""
        chance = random.Random(f"{self.seed} {seed}")
        self.poison()
        llm_engine = self.running.llm.llm_engine
        arrivals = [self.draw(chance) for _ in range(chance.randint(3, 10))]
        prompts, aborted, answers = {}, set(), {}
        busy = chance.choice((0.1, 0.9))
        while arrivals or llm_engine.has_unfinished_requests():
            while arrivals and (chance.random() < busy or not llm_engine.has_unfinished_requests()):
                prompt, max_tokens = arrivals.pop()
                self.names += 1
                name = str(self.names)
                llm_engine.add_request(
                    name,
                    {"prompt_token_ids": prompt},
                    SamplingParams(
                        max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False
                    ),
                )
                prompts[name] = prompt
            for output in llm_engine.step():
                answers[output.request_id] = list(output.outputs[0].token_ids)
            alive = sorted(set(prompts) - aborted)
            if alive and chance.random() < 0.01:
                aborted.add(chance.choice(alive))
                llm_engine.abort_request(sorted(aborted))
        for name, prompt in prompts.items():
            self.check(f"seeds {self.seed}, {seed}", prompt, answers.get(name, []))
        assert set(prompts) - aborted <= set(answers), f"seeds {self.seed}, {seed}: lost requests"
        self.counts["finished"] += len(prompts) - len(aborted)
        self.counts["aborted"] += len(aborted)
        pool = self.running.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, (
            f"seeds {self.seed}, {seed}: blocks have leaked"
        )

    def draw(self, chance):
        """A prompt that may share its beginning with others, and a length of the answer."""
        edges = EDGES if chance.random() < 0.5 else EDGES[-6:]
        prompt = chance.choice(self.documents)[: chance.choice(edges)]
        if chance.random() < 0.4:
            prompt = prompt + [chance.randrange(512) for _ in range(chance.randint(1, 50))]
        return prompt, chance.choice((1, 33, 70, 140, 140, 140))

    def check(self, where, prompt, answer):
        """The answer, whole or cut off, is what the oracle would say."""
        if not answer:
            return
        logits = self.oracle.logits(prompt + answer[:-1], exact_until=len(prompt))
        expected = logits[len(prompt) - 1 :].argmax(-1).tolist()
        assert answer == expected, (
            f"{where}: a prompt of {len(prompt)} tokens gets {answer}, not {expected}"
        )
        self.counts["tokens"] += len(answer)

    def poison(self):
        """NaN in every block that is free and not in the prefix cache."""
        for block in self.running.block_pool.blocks:
            if block.ref_cnt == 0 and block.block_hash is None and not block.is_null:
                self.running.memory[block.block_id] = float("nan")


@contextmanager
def arena(seed, model, speculation=None):
    """An engine drawn from a seed, with vLLM's `speculative_config` if given."""
    chance = random.Random(seed)
    mask = random_mask(model, list(chance.choice(KEPT)), seed=seed)
    chunk = chance.choice((32, 50, 128, 512))
    options = {
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": 8,
        "enable_prefix_caching": chance.random() < 0.7,
        "max_num_batched_tokens": chunk,
        "speculative_config": speculation,
    }
    # Room for one request of full length, for a little more, or for all.
    options["num_gpu_blocks_override"] = chance.choice((26, 32, 250))
    with engine(model, mask, sink=SINK, recent=RECENT, **options) as running:
        yield Arena(seed, running, Oracle(model, mask.keep, SINK, RECENT))


def play(seed, model, scenarios, speculation=None):
    """Scenarios of one arena; counts of what happened, with what became of drafts."""
    with arena(seed, model, speculation) as engine:
        preempted, drafts = engine.running.watch_preemptions(), watch(engine.running)
        for scenario in range(scenarios):
            engine.scenario(scenario)
        counts = Counter(engine.counts) + drafts
        counts["preempted"] = len(preempted)
    print(f"arena {seed}: {dict(counts)}")
    return counts
