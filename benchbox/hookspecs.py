"""Every hook of benchbox. All but the last take nothing and return a list of classes; implement those you need.

A plugin package is a module named by an entry point of the group ``benchbox``::

    # pyproject.toml
    [project.entry-points.benchbox]
    my-attacks = "my_attacks"

    # my_attacks/__init__.py
    from benchbox.hookspecs import hookimpl

    @hookimpl
    def benchbox_attacks():
        from my_attacks.sign import SignAttack   # import inside: `benchbox --help` loads no torch
        return [SignAttack]

Two plugins that offer one name of one kind are an error that names both. The examples below assume these imports::

    import copy
    import numpy as np
    import torch
    from matplotlib.figure import Figure as Drawing
    from torch import nn
    from benchbox import api
    from benchbox.domain import Score
    from benchbox.hookspecs import hookimpl
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from benchbox import api
    from benchbox.domain import CellFinished

PROJECT = "benchbox"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def benchbox_datasets() -> list[type[api.Dataset]]:  # type: ignore[empty-body]
    """Data sets: a fixed order of images in [0, 1] and labels, split into train, calibration and test.

    Example::

        class TwoBlobs(api.Dataset):
            name = "two-blobs"
            num_classes, shape = 2, (1, 2, 2)

            def load(self, split, data_dir):
                seed = ("train", "calibration", "test").index(split)   # three disjoint parts, the same at every call
                noise = torch.rand(100, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
                labels = torch.arange(100) % 2
                return api.Examples((labels[:, None, None, None] + noise) / 2, labels)

        @hookimpl
        def benchbox_datasets():
            return [TwoBlobs]
    """


@hookspec
def benchbox_models() -> list[type[api.Model]]:  # type: ignore[empty-body]
    """Classifiers: modules from [0, 1] images to logits, normalisation inside.

    Example::

        class Stripes(api.Model):
            name = "stripes"

            class Options(api.Options):
                num_classes: int = 2

            def load(self, data_dir):
                return nn.Sequential(nn.AdaptiveAvgPool2d((self.options.num_classes, 1)), nn.Flatten())

            def fingerprint(self, data_dir):   # the digest of the weights, where there is a file
                return ""

        @hookimpl
        def benchbox_models():
            return [Stripes]
    """


@hookspec
def benchbox_weight_perturbations() -> list[type[api.WeightPerturbation]]:  # type: ignore[empty-body]
    """Changes of a model's parameters without an adversary: filters, noise, quantisation.

    Example::

        class Shrink(api.WeightPerturbation):
            name = "shrink"

            class Options(api.WeightPerturbation.Options):   # brings the option `layer`
                factor: float = 0.5

            def apply(self, model, rng):
                model = copy.deepcopy(model)
                for part in api.target_layers(model, self.targets, self.options.layer).values():
                    part.weight.data.mul_(self.options.factor)
                return model

        @hookimpl
        def benchbox_weight_perturbations():
            return [Shrink]
    """


@hookspec
def benchbox_defenses() -> list[type[api.Defense]]:  # type: ignore[empty-body]
    """Defenses: what stands between an input and the model's answer; maskers, purifiers, detectors.

    Example::

        class Rounded(api.Protected):
            def forward(self, x):
                return self.model((x * 7).round() / 7)

            def surrogate(self):   # BPDA: rounding is treated as the identity
                return self.model

        class Rounding(api.Defense):
            name = "rounding"

            def protect(self, model, calibration, rng):
                return Rounded(model)

        @hookimpl
        def benchbox_defenses():
            return [Rounding]
    """


@hookspec
def benchbox_attacks() -> list[type[api.Attack]]:  # type: ignore[empty-body]
    """Attacks: a BudgetAttack stays within eps, a MinimumNormAttack looks for the nearest adversarial input, and a
    StepAttack takes one step at a time, which lets the engine keep its batches full.

    Example::

        class SignAttack(api.BudgetAttack):
            name, norms, needs = "sign", ("linf",), "gradients"

            def perturb(self, model, x, y, threat, rng):
                x = x.clone().requires_grad_()
                loss = api.adversarial_loss(model(x), y, threat).sum()
                (gradient,) = torch.autograd.grad(loss, x)
                return (x + threat.eps * gradient.sign()).clamp(0, 1).detach()

        @hookimpl
        def benchbox_attacks():
            return [SignAttack]
    """


@hookspec
def benchbox_probes() -> list[type[api.Probe]]:  # type: ignore[empty-body]
    """Probes: measurements of a model's insides on clean and adversarial inputs, stored beside the scores.

    Example::

        class WeightNorm(api.Probe):
            name, axis = "weight-norm", "layer"

            def measure(self, model, batch, rng):
                return {name: {"l2": float(p.norm())} for name, p in model.named_parameters()}

        @hookimpl
        def benchbox_probes():
            return [WeightNorm]
    """


@hookspec
def benchbox_metrics() -> list[type[api.Metric]]:  # type: ignore[empty-body]
    """Metrics: pure functions of a record; a new one scores old records without a new attack.

    Example::

        class Confusion(api.Metric):
            name, higher_is_better = "most-common-mistake", False

            def score(self, record):
                wrong = record.prediction[record.success]
                share = np.bincount(wrong).max() / len(wrong) if len(wrong) else None
                return {"share": Score(share, n=len(wrong))}

        @hookimpl
        def benchbox_metrics():
            return [Confusion]
    """


@hookspec
def benchbox_executors() -> list[type[api.Executor]]:  # type: ignore[empty-body]
    """Executors: where jobs run, one after another or many at once, here or on other machines.

    Example::

        class Reversed(api.Executor):
            name, in_process = "reversed", True

            def map(self, fn, jobs):
                for job in reversed(list(jobs)):
                    yield from fn(job)

        @hookimpl
        def benchbox_executors():
            return [Reversed]
    """


@hookspec
def benchbox_reports() -> list[type[api.Report]]:  # type: ignore[empty-body]
    """Reports: pages and pictures made from the results of many cells.

    Example::

        class Count(api.Report):
            name = "count"

            def render(self, results, out):
                path = out / "count.txt"
                path.write_text(f"{len(results.rows())} cells")
                return [path]

        @hookimpl
        def benchbox_reports():
            return [Count]
    """


@hookspec
def benchbox_figures() -> list[type[api.Figure]]:  # type: ignore[empty-body]
    """Figures: pictures of examples and of what models make of them, drawn from a few cells with their models.

    Example::

        class MeanPerturbation(api.Figure):
            name = "mean-perturbation"

            def draw(self, scenes, rng):
                attacked = [scene for scene in scenes if scene.adversarial is not None]
                if not attacked:
                    raise api.ContractError("mean-perturbation: no cell has an attack; name one")
                picture = Drawing(layout="constrained")
                for ax, scene in zip(picture.subplots(1, len(attacked), squeeze=False)[0], attacked):
                    ax.imshow((scene.adversarial - scene.examples.images).mean((0, 1)).cpu().numpy(), cmap="RdBu")
                    ax.set_title(scene.label)
                return {"": picture}

        @hookimpl
        def benchbox_figures():
            return [MeanPerturbation]
    """


@hookspec
def benchbox_cell_finished(event: CellFinished) -> None:
    """Called in the coordinator after a cell was committed. An exception here is reported and stops nothing.

    Example::

        @hookimpl
        def benchbox_cell_finished(event):
            print(event.done, "of", event.total, event.cell.label)
    """
