"""Command lines for a recipe, right and wrong, as a function of a seed: what people type, and what nobody should."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from stabletrain.config.compose import compose
from stabletrain.config.discovery import groups

RECIPES = ("char_gpt", "digits_cnn")

# values for any key: wrong types, sizes, texts, structures
VALUES = (
    "0", "-1", "1", "2", "3.5", "-0.5", "1e-3", "1e300", "-1e300", "99999999999999999999999", "-99999999999999999999",
    "4294967296", "nan", "inf", "-inf", "true", "false", "null", "''", "' '", "text", "none", "auto",
    "'ünïcode'", "'é'",
    "[]", "[1]", "[1,2,3]", "[nan]", "[[1],[2]]", "[a,b]", "{}", "{a:1}", "{a:{b:{c:1}}}", "{1:2}",
    "{_target_:os.system}",
    "{_target_:stabletrain.ClipNorm}", "'???'", "/", "/nonexistent/x", "/dev/null", "/dev/zero", ".", "..", "../../x",
    "'a b'", "'a=b'", "'a,b'", "'\\'quoted\\''", "'%s'", "'\\n'", "\\$", "50%", "'3ep'", "'1e9tok'", "'-2%'", "'nan%'",
    "00:00:00:00", "2024-01-01", "0x10", "0o7", "1_000", "os.system", "'x'", "yes", "off", "1:30", "1,2", "range(1,3)",
    "${seed}", "${recipe}", "${no.such}", "'${oc.env:STABLETRAIN_NO_SUCH_VARIABLE}'", "'\\${seed}'", "'${seed}${seed}'",
)  # fmt: skip

# wrong in one way that is known
WRONG = (
    "optimzer=adamw", "optimizer=adma", "optimizer=", "optimizer=[adamw]", "optimizer={}", "model=0", "data=nothing",
    "plugins=0", "plugins={}", "plugins.clip=0", "plugins.clip=false", "plugins.clip=''", "plugins.clip=[]",
    "plugins.clip={}", "plugins.clip=1", "plugins.spkie.window=3", "plugins/spkie=none", "plugins/spike=null",
    "callbacks=0", "callbacks.x=0", "callbacks.x={}", "callbacks.x.patience=3", "launch=[]", "launch.threads=100000",
    "launch.processes=100000", "launch.nodes=2", "launch.threads=0", "launch.procs=2", "launch.kind=locl", "seed=true",
    "seed=1.0", "seed=-1", "seed=1,2", "seed=range(3,1)", "seed=''", "run_dir=", "run_dir=/dev/null/x", "resume=/",
    "resume=nowhere.ckpt", "resume=/dev/zero", "resume=", "dry_run=3", "guard.mode=fast", "guard.max_attempts=0",
    "guard.events=/nonexistent/x", "plugins.spike.spill=/nonexistent/x", "trainer.max_steps=-5", "trainer.max_steps=0",
    "trainer.max_epochs=-3", "trainer.limit_train_batches=0", "trainer.val_check_interval=0", "trainer.max_epocs=3",
    "trainer.accumulate_grad_batches=0", "trainer.check_val_every_n_epoch=0", "trainer.log_every_n_steps=-1",
    "trainer.num_sanity_val_steps=-2", "trainer.max_time=00:00:00:00", "trainer.devices=2", "trainer.logger=true",
    "trainer.callbacks=[]", "optimizer.lr=nan", "optimizer.lr=fast", "optimizer.wieght_decay=1", "hydra.job.name=x",
    "hydra/launcher=basic", "model@x=char_gpt", "precision=bf16-mixed", "precision.precision=bf16-mixd", "a=[",
    "=3", "a.b", "a..b=1", "é=1", "trainer.é=1", "model._target_=os.system", "callbacks.x._target_=torch.os.system",
    "logger=none logger.experiment=3", "schedule=cosine schedule.total=0",
    "schedule=cosine schedule.lr_warmup=99999999",
    "schedule=step schedule.milestones=[0]", "schedule=wsd schedule.decay=200%", "schedule=none schedule.kind=cosine",
    "+chaos=nan_grad chaos.at_step=3 chaos.rank=99", "+chaos=nan_grad chaos.at_step=-1", "+chaos=nan_grad",
    "+chaos=slow_rank chaos.at_step=3 chaos.seconds=nan", "~nope", "~plugins", "~launch.threads", "~seed",
    "~trainer.devices", "~recipe", "~model", "plugins/clip=norm plugins.clip.max_norm=-1",
    "plugins/clip=norm plugins.clip.max_nrm=3",
)  # fmt: skip

# right
RIGHT = (
    "seed=3", "optimizer.lr=3e-4", "trainer.max_steps=20 schedule=constant", "trainer.max_epochs=3", "run_dir=null",
    "plugins/clip=none", "plugins/clip=norm plugins.clip.max_norm=0.5", "~plugins/clip", "plugins/spike=detect",
    "optimizer=sgd", "logger=none", "launch=torchrun", "launch.threads=2", "precision=bf16_mixed", "strategy=ddp",
    "+chaos=nan_grad chaos.at_step=1", "schedule=none", "guard.mode=exact", "~guard", "trainer.max_time=00:01:00:00",
    "+plugins/clip=norm", "++seed=4", "optimizer.betas=[0.9,0.99]", "run_dir='${recipe}'", "plugins.clip=null",
)  # fmt: skip


def config_lines(seed: int, count: int) -> list[list[str]]:
    """Return distinct lists of words: the recipe, then overrides.

    Args:
        seed: of the choices.
        count: number of lines, at most some ten thousand.
    """
    draw = random.Random(seed)
    keys = {recipe: sorted(_leaves(compose(recipe).config)) for recipe in RECIPES}
    found: dict[tuple[str, ...], None] = {}
    fixed = [(recipe, *line.split()) for line in (*WRONG, *RIGHT) for recipe in RECIPES]
    draw.shuffle(fixed)
    every_fourth = iter(fixed)
    while len(found) < count:
        line = next(every_fourth, None) if len(found) % 4 == 0 else None
        found[line or tuple(_random_line(draw, keys))] = None
    return [list(line) for line in found]


def _random_line(draw: random.Random, keys: Mapping[str, list[str]]) -> Iterator[str]:
    recipe = draw.choice(RECIPES)
    yield recipe
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        kind = draw.random()
        if kind < 0.6:
            yield f"{draw.choice(('', '', '', '+', '++'))}{draw.choice(keys[recipe])}={draw.choice(VALUES)}"
        elif kind < 0.7:
            yield f"~{draw.choice(keys[recipe])}"
        elif kind < 0.85:
            group, options = draw.choice(sorted(groups().items()))
            yield f"{draw.choice(('', '', '+', '~'))}{group}={draw.choice([*options, draw.choice(VALUES)])}"
        elif kind < 0.95:
            key = draw.choice(keys[recipe])
            yield f"{key[:-1]}={draw.choice(VALUES)}" if draw.random() < 0.5 else f"{key}.x={draw.choice(VALUES)}"
        else:
            yield from draw.choice((*WRONG, *RIGHT)).split()


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
