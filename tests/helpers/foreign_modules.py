"""Modules that other projects wrote, as small trainings like those of `features`.

A function imports its project; where that is not installed it raises ModuleNotFoundError.
"""

import functools
import importlib
from typing import Any

import torch
from features import Feature, Parts
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

WORDS = 101
NEW, OLD = ("lightning.pytorch",), ("pytorch_lightning",)  # the package that the project itself imports


class Tokens(Dataset[tuple[Tensor, Tensor]]):
    """Random words and the words after them, in place of the demos' text, which is downloaded."""

    vocab_size = WORDS

    def __init__(self) -> None:
        self.words = torch.randint(0, WORDS, (400,), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.words[index : index + 12], self.words[index + 1 : index + 13]


def boring(pl: Any, name: str) -> Parts:
    demos = importlib.import_module(f"{pl.__name__}.demos.boring_classes")
    data = DataLoader(demos.RandomDataset(32, 64), batch_size=4, shuffle=True)
    return Parts(getattr(demos, name)(), data)


def demo_transformer(pl: Any) -> Parts:
    module = importlib.import_module(f"{pl.__name__}.demos").LightningTransformer(vocab_size=WORDS)
    module.prepare_data = lambda: None
    return Parts(module, DataLoader(Tokens(), batch_size=4, shuffle=True))


def demo_lstm(pl: Any) -> Parts:
    demo = importlib.import_module(f"{pl.__name__}.demos.lstm")
    module = demo.LightningLSTM(vocab_size=WORDS)
    module.prepare_data = lambda: None
    return Parts(module, DataLoader(Tokens(), batch_sampler=demo.SequenceSampler(Tokens(), 10)))


def hugging_face_decoder(pl: Any) -> Parts:
    transformers = importlib.import_module("transformers")

    class Decoder(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            config = transformers.GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2)
            self.model = transformers.GPT2LMHeadModel(config)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.model(input_ids=batch[0], labels=batch[0]).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Parts(Decoder(), DataLoader(Tokens(), batch_size=4, shuffle=True))


def forecasting(pl: Any, name: str) -> Parts:
    forecast = importlib.import_module("pytorch_forecasting")
    pandas = importlib.import_module("pandas")
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"time": time, "series": str(series), "value": float(value)}
        for series in range(4)
        for time, value in enumerate(torch.randn(60, generator=generator).cumsum(0))
    ]
    data = forecast.TimeSeriesDataSet(
        pandas.DataFrame(rows),
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
    )
    if name == "NHiTS":
        module = forecast.NHiTS.from_dataset(data, learning_rate=1e-2, hidden_size=8)
    else:
        module = forecast.TemporalFusionTransformer.from_dataset(data, learning_rate=1e-2, hidden_size=4)
    return Parts(module, data.to_dataloader(train=True, batch_size=4))


def deep_ar(pl: Any) -> Parts:
    models = importlib.import_module("gluonts.torch.model.deepar.lightning_module")
    module = models.DeepARLightningModule(
        {
            "freq": "D",
            "context_length": 8,
            "prediction_length": 4,
            "num_feat_dynamic_real": 1,
            "num_feat_static_real": 1,
            "num_feat_static_cat": 1,
            "cardinality": [3],
            "lags_seq": [1, 2, 3],
            "hidden_size": 8,
        },
        lr=1e-2,
    )
    generator = torch.Generator().manual_seed(0)
    past = 8 + max(module.model.lags_seq)
    count = 80
    names = {
        "feat_static_cat": torch.randint(0, 3, (count, 1), generator=generator),
        "feat_static_real": torch.randn(count, 1, generator=generator),
        "past_time_feat": torch.randn(count, past, 1, generator=generator),
        "past_target": torch.randn(count, past, generator=generator),
        "past_observed_values": torch.ones(count, past),
        "future_time_feat": torch.randn(count, 4, 1, generator=generator),
        "future_target": torch.randn(count, 4, generator=generator),
        "future_observed_values": torch.ones(count, 4),
    }
    rows = [{name: value[index] for name, value in names.items()} for index in range(count)]
    return Parts(module, DataLoader(rows, batch_size=4, shuffle=True))  # type: ignore[arg-type]


def collective_variable(pl: Any) -> Parts:
    cvs = importlib.import_module("mlcolvar.cvs")
    data = importlib.import_module("mlcolvar.data")
    inputs = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    module = cvs.AutoEncoderCV(encoder_layers=[6, 8, 2])
    split = torch.Generator().manual_seed(0)  # of the data, in every fit: a resumed run must have the same
    dataset = data.DictDataset({"data": inputs})
    return Parts(module, data.DictModule(dataset, lengths=[0.8, 0.2], batch_size=8, generator=split))


def physics(pl: Any) -> Parts:
    problem = importlib.import_module("pina.problem.zoo").SupervisedProblem
    points = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    network = importlib.import_module("pina.model").FeedForward(3, 1, inner_size=8, n_layers=1)
    solver = importlib.import_module("pina.solver").SupervisedSolver(
        problem=problem(points, points.sum(1, keepdim=True)), model=network, use_lt=False
    )
    trainer = functools.partial(importlib.import_module("pina").Trainer, solver, batch_size=8)
    return Parts(solver, None, trainer=trainer)


def tabular(pl: Any) -> Parts:
    pytorch_tabular = importlib.import_module("pytorch_tabular")
    config = importlib.import_module("pytorch_tabular.config")
    models = importlib.import_module("pytorch_tabular.models")
    pandas = importlib.import_module("pandas")
    numbers = torch.randn(80, 3, generator=torch.Generator().manual_seed(0)).tolist()
    frame = pandas.DataFrame([{"a": a, "b": b, "target": c} for a, b, c in numbers])
    model = pytorch_tabular.TabularModel(
        data_config=config.DataConfig(target=["target"], continuous_cols=["a", "b"]),
        model_config=models.CategoryEmbeddingModelConfig(task="regression", layers="8"),
        optimizer_config=config.OptimizerConfig(),
        trainer_config=config.TrainerConfig(batch_size=8, accelerator="cpu", progress_bar="none"),
        verbose=False,
    )
    data = model.prepare_dataloader(train=frame)
    return Parts(model.prepare_model(data), data.train_dataloader(), data.val_dataloader())


FOREIGN = [
    Feature("Lightning's BoringModel", lambda pl: boring(pl, "BoringModel"), spoil="loss"),
    Feature("Lightning's DemoModel", lambda pl: boring(pl, "DemoModel"), spoil="loss"),
    Feature("Lightning's LightningTransformer", demo_transformer, spoil="loss"),
    Feature("Lightning's LightningLSTM, with state", demo_lstm, spoil="loss"),
    Feature("a Hugging Face decoder (GPT-2)", hugging_face_decoder, spoil="loss"),
    Feature("pytorch-forecasting TFT", lambda pl: forecasting(pl, "TFT"), packages=NEW, spoil="loss"),
    Feature("pytorch-forecasting NHiTS", lambda pl: forecasting(pl, "NHiTS"), packages=NEW, spoil="loss"),
    Feature("gluonts DeepAR", deep_ar, packages=NEW, spoil="loss"),
    Feature("mlcolvar AutoEncoderCV", collective_variable, packages=NEW, spoil="loss"),
    Feature("pina SupervisedSolver", physics, packages=NEW, spoil="loss"),
    Feature("pytorch-tabular CategoryEmbedding", tabular, packages=OLD, spoil="loss"),
]
