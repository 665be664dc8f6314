"""What a job would do and need, before any weight is downloaded: ``llmprune plan``.

The model is built on ``meta`` from config.json; sizes and dtypes come from the safetensors headers. Bytes of each stage
are the sums :mod:`llmprune.memory` documents; seconds are floating-point operations over the rate a short matrix product
reaches on the device.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import get_safetensors_metadata, hf_hub_download
from transformers import PreTrainedModel

from llmprune import memory
from llmprune.allocate import ALLOCATORS
from llmprune.allocate.evolution import MAX_RUNGS
from llmprune.allocation import NUM_CHUNKS, search_tokens, searches
from llmprune.anatomy.blocks import Stack, find_stack
from llmprune.anatomy.sites import Site, check_pattern, select, total_weights
from llmprune.description import describe_model
from llmprune.devices import device_name, free_bytes, pick_device
from llmprune.engines.evolution import MEMORY_SHARE
from llmprune.engines.reconstruct import HELD_OUT, NUM_CHECKS
from llmprune.engines.survey import check_budget, group_of, probe_sequences, surveyed_by, targets_of
from llmprune.errors import DoesNotFit
from llmprune.hidden import Place
from llmprune.io.models import build_empty, check_files, hub_errors, load_config, local_directory
from llmprune.io.stdlib_text import stdlib_documents
from llmprune.io.streaming import not_streamed
from llmprune.io.text import check_source
from llmprune.measure.quality import windows_per_batch
from llmprune.methods import method_of
from llmprune.refining import settings_of
from llmprune.report import Plan, StagePlan
from llmprune.spec import Need, Pattern, PruneConfig, default_seq_len
from llmprune.structuring.cost import Cost, Sizes, structure_cost
from llmprune.structuring.groups import units_of
from llmprune.structuring.stage import check_structure

_EFFICIENCY = 0.5
"""Share of a plain matrix product's rate that a whole forward reaches, as measured on small and medium models."""


def plan(
    model: str | Path | None = None, config: PruneConfig | None = None, *, out: str | Path = ".", **overrides: Any
) -> Plan:
    """The plan of a job; ``problems`` says what does not fit and which flag would make it fit.

    Raises:
        UserError: the same refusals as the job itself, as far as they can be known without weights.
    """
    if model is not None:
        overrides["model"] = str(model)
    return _Planner(PruneConfig.build(config, **overrides), Path(out)).plan()


def require_fit(result: Plan) -> None:
    """Raise DoesNotFit with the plan's first problem."""
    if result.problems:
        raise DoesNotFit(result.problems[0])


@dataclass(frozen=True)
class _Headers:
    """What the safetensors headers say."""

    weights_bytes: int
    dtype: str
    download_bytes: int


@dataclass
class _Planner:
    config: PruneConfig
    out: Path

    def plan(self) -> Plan:
        config = self.config
        method = method_of(config)
        self.device = pick_device(config.device)
        for source in (config.calibration_source(), *config.eval_sources()):
            check_source(source)
        path, self.headers = self._read_headers()
        transformers_config = load_config(path, config)
        self.text_config = transformers_config.get_text_config()
        model = build_empty(transformers_config, config)
        dtype = self.headers.dtype if config.dtype == "auto" else config.dtype
        self.itemsize = getattr(torch, dtype).itemsize
        stack = find_stack(model)
        self.sites = [site for sites in stack.sites for site in select(sites, config.skip)]
        blocks = [select(sites, config.skip) for sites in stack.sites]
        self.tuned_sites = max(blocks, key=total_weights) if config.reconstruct else []
        self.structure = Pattern.parse(config.pattern).structure
        if self.structure:
            check_structure(config, model, stack)
        else:
            check_pattern(self.sites, Pattern.parse(config.pattern))
            check_budget(config, self.sites)
        self.need = method.needs
        self.seq_len = config.seq_len or default_seq_len(self.text_config)
        self.weights: int = sum(parameter.numel() for parameter in model.parameters()) * self.itemsize
        blocks_numel = [sum(parameter.numel() for parameter in block.parameters()) for block in stack.blocks]
        self.block_weights: int = max(blocks_numel) * self.itemsize
        self.rest_weights: int = self.weights - sum(blocks_numel) * self.itemsize
        self.place, self.why_not_streamed = self._place()
        self.hidden_bytes: int = config.num_samples * self.seq_len * self.text_config.hidden_size * self.itemsize
        self.hidden_place = self._hidden_place()
        self.evaluation_tokens = sum(
            min(_evaluation_tokens(source, self.seq_len), config.max_eval_tokens or 2**62) for source in config.eval_sources()
        )
        self.cost = self._structure_cost(model, stack) if self.structure else None
        return self._assemble(model, stack, dtype)

    @property
    def _held_weights(self) -> int:
        """Bytes of weights in CPU memory: from disk a block at work, one that is being read and one that is being written."""
        return self.rest_weights + 3 * self.block_weights if self.place == "disk" else self.weights

    def _place(self) -> tuple[Place, str | None]:
        """Where the weights wait, and why not on disk where they cannot."""
        on_gpu = self.device.type != "cpu"
        place = memory.weights_place(
            self.config.offload, self.weights, device_free=free_bytes(self.device) if on_gpu else None,
            cpu_free=free_bytes(torch.device("cpu")),
        )  # fmt: skip
        reason = not_streamed(self.config, self.out)
        return ("cpu", reason) if place == "disk" and reason else (place, reason)

    def _hidden_place(self) -> Place:
        """Where hidden states wait between blocks, beside the weights."""
        device_free = None
        if self.device.type != "cpu":
            device_free = free_bytes(self.device) - (self.weights if self.place == "device" else self.block_weights)
        in_cpu_memory = self._held_weights if device_free is None or self.place != "device" else 0
        sets = 2 if self.config.reconstruct else 1
        return memory.hidden_place(
            self.config.offload, sets * self.hidden_bytes, device_free=device_free,
            cpu_free=free_bytes(torch.device("cpu")) - in_cpu_memory,
        )  # fmt: skip

    def _assemble(self, model: PreTrainedModel, stack: Stack, dtype: str) -> Plan:
        config, on_gpu = self.config, self.device.type != "cpu"
        free_cpu, free_gpu = free_bytes(torch.device("cpu")), free_bytes(self.device) if on_gpu else 0
        batch_size = config.batch_size or self._batch_size(config.num_samples)
        stages = self._stages(batch_size, on_gpu)
        peak_cpu = max(stage.peak_cpu_bytes for stage in stages)
        peak_gpu = max(stage.peak_gpu_bytes for stage in stages)
        hidden = self.hidden_bytes
        dense_hidden = self.evaluation_tokens * self.text_config.hidden_size * self.itemsize
        copies = 3 if config.export == "packed" else 2  # the dense file is there until the packed one is whole
        copies -= self.place == "disk"  # blocks are recorded as the files they will be
        disk = copies * self.weights + 2 * hidden + dense_hidden + (self.cost.disk_bytes if self.cost else 0)
        if self.hidden_place == "disk":
            disk += hidden * (2 if config.reconstruct else 1)
        if config.refine != "none":  # masks, and where they are tuned the blocks once more
            disk += total_weights(self.sites) // 4 + (self.weights if config.reconstruct else 0)
        where = self.out.resolve()
        while not where.exists():
            where = where.parent
        free_disk = shutil.disk_usage(where).free
        description = describe_model(model, stack, None).model_copy(
            update={"name": config.model, "revision": config.revision or "", "dtype": dtype, "weights_bytes": self.weights}
        )
        # What this process already holds is part of the peak, not of what is still free.
        free_cpu += psutil.Process().memory_info().rss
        return Plan(
            config=config,
            model=description,
            walk=self._walk(batch_size),
            batch_size=batch_size,
            seq_len=self.seq_len,
            calibration_tokens=config.num_samples * self.seq_len,
            evaluation_tokens=self.evaluation_tokens,
            device=device_name(self.device),
            weights_place=self.place,
            hidden_place=self.hidden_place,
            stages=tuple(stages),
            peak_cpu_bytes=peak_cpu,
            peak_gpu_bytes=peak_gpu,
            free_cpu_bytes=free_cpu,
            free_gpu_bytes=free_gpu,
            disk_bytes=disk,
            free_disk_bytes=free_disk,
            download_bytes=self.headers.download_bytes,
            seconds=sum(stage.seconds for stage in stages),
            problems=tuple(self._problems(peak_cpu, free_cpu, peak_gpu, free_gpu, disk, free_disk)),
            **self._modules(model, stack),
        )

    def _modules(self, model: PreTrainedModel, stack: Stack) -> dict[str, Any]:
        """What pattern structured can take groups from, in place of all sites."""
        if self.structure != "structured":
            return {"num_sites": len(self.sites), "num_pruned_weights": total_weights(self.sites)}
        units = units_of(self.config, model, stack)
        return {
            "num_sites": sum(1 + len(module.producers) for module in units.modules)
            + sum(len(mixture.entries) for mixture in units.mixtures),
            "num_pruned_weights": sum(part.num_groups * part.parameters_per_group for part in units.parts),
            "num_modules": len(units.parts),
            "left": units.left,
        }

    def _stages(self, batch_size: int, on_gpu: bool) -> list[StagePlan]:
        """Peaks and seconds of each stage; with an accelerator that holds the model, its share is on the accelerator."""
        config, vocab = self.config, self.text_config.vocab_size
        base = psutil.Process().memory_info().rss
        resident = on_gpu and self.place == "device"
        window_tokens = min(windows_per_batch(self.seq_len, vocab) * self.seq_len, self.evaluation_tokens)
        dense_hidden = self.evaluation_tokens * self.text_config.hidden_size * self.itemsize
        tokens = config.num_samples * self.seq_len
        hidden = tokens * self.text_config.hidden_size * self.itemsize
        forward = 2.0 * sum(site.numel for site in self.sites)
        scoring = memory.logits_bytes(num_tokens=window_tokens, vocab_size=vocab, with_teacher=False)
        comparing = memory.logits_bytes(num_tokens=window_tokens, vocab_size=vocab, with_teacher=True)
        activations = self._activations(window_tokens)
        pruning = (
            # One batch is held as input, output and the journal's copy on its way to disk; small ones hardly at all.
            hidden * (3 if batch_size >= config.num_samples else 1)
            + self._activations(batch_size * self.seq_len)
            + memory.solve_bytes(self.sites, self.need)
        )
        if self._walk(batch_size) == "one-pass" and batch_size < config.num_samples:
            pruning += memory.paused_bytes(
                self.sites, num_tokens=tokens, hidden_size=self.text_config.hidden_size, itemsize=self.itemsize
            )
        tuning, tuning_bytes = 0.0, 0
        if config.reconstruct:
            # A backward costs two forwards; the dense hidden states go on once, held-out batches a few times.
            batch_tokens = batch_size * self.seq_len
            held_out = HELD_OUT * (NUM_CHECKS + 1) * tokens
            tuning = forward * (3 * batch_tokens * config.reconstruct_steps + held_out + tokens)
            tuning_bytes = max(pruning, self._tuning_bytes(batch_tokens)) + 2 * hidden
        rounds = config.reconstruct_rounds if config.reconstruct else 1
        walks = {"two-pass": 1.0, "one-pass": 0.0, "dense": 0.0}.get(
            self._walk(batch_size), 1.6
        )  # forwards that only collect statistics
        passes = 1 + rounds * walks
        passes += 1.0 if config.permute else 0.0  # the norms of the inputs; the folds are tried on one batch
        gram = 0.0
        if self.need == Need.GRAM:
            gram = 2.0 * tokens * sum(site.shape[1] ** 2 for site in self._leaders())
        head = 2.0 * vocab * self.text_config.hidden_size
        rate = _flops_per_second(self.device) * _EFFICIENCY
        needs = [
            ("load", 0.0, 0, 0),
            ("dense", (forward + head) * self.evaluation_tokens, scoring + activations, dense_hidden),
            *(
                [("structure", self.cost.flops, max(pruning, self.cost.working_bytes), self.cost.kept_bytes)]
                if self.cost
                else [
                    *self._survey(forward, tokens, pruning),
                    *self._pruning((forward * passes) * tokens + rounds * gram, pruning, tuning, tuning_bytes, forward + head),
                ]
            ),
            ("pruned", (forward + 2 * head) * self.evaluation_tokens, comparing + activations, dense_hidden),
            ("save", 0.0, 0, 0),
        ]
        stages = []
        for name, flops, working, kept in needs:
            weights, held = 0 if resident else self._held_weights, self.rest_weights + self.block_weights
            if self.place != "disk":
                one_block = not resident and name in ("prune", "allocate", "reconstruct", "structure")
                held = self.block_weights if one_block else self.weights
            on_device = held + working
            cpu = base + weights + kept + (0 if on_gpu else working)
            seconds = flops / rate + (self.weights / 1e9 if name in ("load", "save") else 0.0)
            stages.append(
                StagePlan(name=name, seconds=seconds, peak_cpu_bytes=int(cpu), peak_gpu_bytes=int(on_device) if on_gpu else 0)
            )
        return stages

    def _pruning(
        self, walk: float, pruning: int, tuning: float, tuning_bytes: int, forward: float
    ) -> list[tuple[str, float, int, int]]:
        """The walk with the tuning of its blocks; where a mask is refined, the walk, the refinement and then the tuning.

        A refinement keeps the dense weights of the sites in CPU memory, and tuning after it the support, a byte a weight.
        """
        config = self.config
        if config.refine == "none":
            return [("prune", walk + tuning, max(pruning, tuning_bytes), 0)]
        settings = settings_of(config, seq_len=self.seq_len, vocab_size=self.text_config.vocab_size)
        numel = total_weights(self.sites)
        dense = numel * self.itemsize
        layers = min(settings.layers_per_step or len(self.sites), len(self.sites))
        learn = config.num_samples - config.num_held_out
        tokens = min(settings.num_sequences, learn) * self.seq_len
        # A backward costs two forwards; the gradients of the sites of a pass are as much again as their share of one.
        each = forward * (3 * tokens + config.num_held_out * self.seq_len) + 2.0 * tokens * numel * layers / len(self.sites)
        if settings.hessian == "exact":
            each += 4 * forward * tokens * settings.block_size * layers
        working = memory.refine_bytes(
            self.sites, num_layers=layers, num_tokens=tokens, batch_tokens=settings.batch_size * self.seq_len,
            itemsize=self.itemsize, vocab_size=self.text_config.vocab_size,
        )  # fmt: skip
        refining = (settings.passes(len(self.sites)) or 0) * each
        stages = [("prune", walk, pruning, dense), ("refine", refining, working, dense)]
        return [*stages, ("reconstruct", tuning, tuning_bytes, dense + numel)] if config.reconstruct else stages

    def _structure_cost(self, model: PreTrainedModel, stack: Stack) -> Cost:
        hidden_size = self.text_config.hidden_size
        sizes = Sizes(
            num_tokens=self.config.num_samples * self.seq_len, seq_len=self.seq_len,
            forward=2.0 * sum(site.numel for sites in stack.sites for site in sites),
            head=2.0 * self.text_config.vocab_size * hidden_size, hidden_bytes=hidden_size * self.itemsize,
        )  # fmt: skip
        return structure_cost(self.config, model, stack, sizes)

    def _survey(self, forward: float, tokens: int, pruning: int) -> list[tuple[str, float, int, int]]:
        """What the pass over the dense model needs, where the allocation takes one: name, operations, working and kept bytes.

        Curves take the Gram matrices, and a stream of the probe sequences for every group of sites.
        """
        if self.config.allocation == "uniform":
            return []
        facts = ALLOCATORS[self.config.allocation].needs
        if facts == "shapes":
            return [("allocate", 0.0, 0, 0)]
        if facts == "scores":
            return [("allocate", forward * tokens, pruning, 0)]
        groups = {group_of(site) for site in self.sites}
        probes = probe_sequences(self.config.num_samples, self.seq_len) * self.seq_len
        gram = 2.0 * tokens * sum(site.shape[1] ** 2 for site in self._leaders())
        num_prunings = 2.0 + sum(len(targets_of(self.config, site)) for site in self.sites) / len(self.sites)
        pruning_once = 4.0 * sum(site.numel * site.shape[1] for site in self.sites)
        head = 2.0 * self.text_config.vocab_size * self.text_config.hidden_size
        flops = forward * tokens + gram + num_prunings * pruning_once + len(groups) * probes * (forward / 2 + head)
        streams = (len(groups) + 1) * probes * self.text_config.hidden_size * self.itemsize
        solving = memory.solve_bytes(self.sites, Need.GRAM) - memory.solve_bytes(self.sites, self.need)
        kept = streams
        if searches(self.config):
            # The rungs are pruned on a second pass; every generation measures its offspring on a part and the best on all.
            num_tokens = search_tokens(self.config.num_samples, self.seq_len)
            rough = self.config.evolution_offspring / NUM_CHUNKS + max(1, self.config.evolution_offspring // 8)
            measured = num_tokens * (1 + self.config.evolution_generations * rough)
            flops += forward * tokens + gram + MAX_RUNGS * pruning_once + measured * (forward + head)
            changes = surveyed_by(self.config).updates_weights
            rungs = sum(site.numel for site in self.sites) * (
                self.itemsize + MAX_RUNGS * (1 / 8 + (1 - self.config.sparsity) * self.itemsize * changes)
            )
            if rungs <= MEMORY_SHARE * free_bytes(torch.device("cpu")):  # else they go to disk
                kept = max(kept, int(rungs))
        return [("allocate", flops, pruning + solving, kept)]

    def _problems(self, peak_cpu: int, free_cpu: int, peak_gpu: int, free_gpu: int, disk: int, free_disk: int) -> list[str]:
        problems = []
        if self.device.type != "cpu" and peak_gpu > free_gpu:
            problems.append(
                f"{self.config.model} needs {_gb(peak_gpu)} on {device_name(self.device)}, {_gb(free_gpu)} are free. "
                f"{self._remedy()} or use --device cpu."
            )
        if peak_cpu > free_cpu:
            problems.append(
                f"{self.config.model} needs {_gb(peak_cpu)} of CPU memory, {_gb(free_cpu)} are free. {self._remedy()}."
            )
        if disk > free_disk:
            problems.append(
                f"the checkpoint and the work directory need {_gb(disk)}, {_gb(free_disk)} are free. Use another --out."
            )
        return problems

    def _remedy(self) -> str:
        """The flag that lowers the largest part that a flag can lower."""
        tokens = self.config.num_samples * self.seq_len
        hidden = 2 * tokens * self.text_config.hidden_size * self.itemsize
        if self.weights > hidden and self.place != "disk":
            on_disk = "--dtype bfloat16" if self.why_not_streamed else "--offload disk"
            return f"The weights alone are most of it: use {on_disk}, a larger machine"
        return f"Use --num-samples {max(1, self.config.num_samples // 4)} or --seq-len {max(128, self.seq_len // 4)}"

    def _batch_size(self, num_samples: int) -> int:
        return memory.choose_batch_size(
            self.sites, num_samples=num_samples, seq_len=self.seq_len, hidden_size=self.text_config.hidden_size,
            itemsize=self.itemsize, need=Need.GRAM if self.config.sequential == "none" else self.need,
            one_pass=self.config.sequential == "group",
            free_bytes=self._free_bytes,
            on_cpu=self.device.type == "cpu", tuned_sites=self.tuned_sites,
            hidden_here=self.hidden_place in ("device", self.device.type),
        )  # fmt: skip

    def _walk(self, batch_size: int) -> str:
        if self.structure:
            return "none"
        if self.config.sequential == "block":
            return "two-pass"
        if self.config.sequential == "none":
            return "dense"
        return "one-pass" if batch_size >= self.config.num_samples or self._can_pause(batch_size) else "staged"

    def _can_pause(self, batch_size: int) -> bool:
        return not self.config.reconstruct and memory.can_pause(
            self.sites, num_samples=self.config.num_samples, batch_size=batch_size, seq_len=self.seq_len,
            hidden_size=self.text_config.hidden_size, itemsize=self.itemsize, need=self.need, free_bytes=self._free_bytes,
        )  # fmt: skip

    @property
    def _free_bytes(self) -> int:
        """Where blocks compute, beside the weights."""
        return free_bytes(self.device) - (self._held_weights if self.device.type == "cpu" else 0)

    def _activations(self, num_tokens: int) -> int:
        return memory.block_activation_bytes(
            self.sites, num_tokens=num_tokens, hidden_size=self.text_config.hidden_size, itemsize=self.itemsize, need=self.need
        )

    def _tuning_bytes(self, num_tokens: int) -> int:
        hidden_size = self.text_config.hidden_size
        return memory.tuning_state_bytes(self.tuned_sites, self.itemsize) + memory.tuning_activation_bytes(
            self.tuned_sites, num_tokens=num_tokens, hidden_size=hidden_size, itemsize=self.itemsize
        )

    def _leaders(self) -> list[Site]:
        """One site for each group that shares an input, as far as names tell: equal module and equal inputs."""
        seen: dict[tuple[str, int], Site] = {}
        for site in self.sites:
            seen.setdefault((site.name.rsplit(".", 1)[0], site.shape[1]), site)
        return list(seen.values())

    def _read_headers(self) -> tuple[Path, _Headers]:
        """config.json's directory, and the headers: of local files, or of the hub's by range requests."""
        path = local_directory(self.config.model)
        if path is not None:
            numels: Counter[str] = Counter()
            for tensor in check_files(path, self.config):
                numels[tensor.dtype] += tensor.numel
            return path, _Headers(0, _main_dtype(numels), 0)
        with hub_errors(self.config):
            found = get_safetensors_metadata(self.config.model, revision=self.config.revision)
            config_file = hf_hub_download(self.config.model, "config.json", revision=self.config.revision)
        counts = {str(name): count for name, count in found.parameter_count.items()}
        size = sum(
            end for file in found.files_metadata.values() for _, end in [max(t.data_offsets for t in file.tensors.values())]
        )
        return Path(config_file).parent, _Headers(size, _main_dtype(counts), size)


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _main_dtype(counts: dict[str, int]) -> str:
    floats = {name: count for name, count in counts.items() if name in _DTYPES}
    return _DTYPES[max(floats, key=lambda name: floats[name])] if floats else "float32"


def _evaluation_tokens(source: str, seq_len: int) -> int:
    """About how many tokens a text has: exact protocols where the field fixes them, else four bytes a token."""
    known = {"wikitext2": 300_000, "ptb": 100_000, "c4": 256 * seq_len}
    if source in known:
        return known[source]
    if source == "stdlib":
        return sum(map(len, stdlib_documents("held-out"))) // 4
    path = Path(source).expanduser()
    if path.is_file():
        return path.stat().st_size // 4
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) // 4 if path.is_dir() else 300_000


def _flops_per_second(device: torch.device, size: int = 1024, seconds: float = 0.2) -> float:
    """The rate of a plain matrix product on the device."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a = torch.ones(size, size, device=device, dtype=dtype)
    (a @ a).sum().item()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        (a @ a)[0, 0].item()
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - begun)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
