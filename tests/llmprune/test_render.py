"""The report page and the model card."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
import time
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from llmprune.io.grid import expert_tokens, make_grid
from llmprune.io.render import (
    TEMPLATES,
    brief,
    command_line,
    duration,
    markdown,
    number,
    percent,
    rate,
    recipe,
    render_card,
    render_html,
    size,
    small,
    times,
    worst,
)
from llmprune.report import BlockReport, Report, SiteReport
from llmprune.spec import PruneConfig
from tests.reports import point, sample_benchmark, sample_report

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = "<script>alert(1)</script>\"'&`|[x](http://evil.test)\n---\n# heading"


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails on an unbalanced tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def hostile_report() -> Report:
    """A report in which every free string tries to be markup."""
    report = sample_report(num_blocks=1)
    text = report.quality[0].text.model_copy(update={"source": HOSTILE, "split": HOSTILE, "description": HOSTILE})
    site = report.blocks[0].sites[0].model_copy(update={"name": HOSTILE, "fallback": HOSTILE})
    assert report.latency is not None
    return sample_report(
        config=PruneConfig(model=HOSTILE, method=HOSTILE, skip=(HOSTILE,)),
        model=report.model.model_copy(update={"name": HOSTILE, "revision": HOSTILE, "model_type": HOSTILE, "dtype": HOSTILE}),
        environment=report.environment.model_copy(update={"llmprune": HOSTILE, "device": HOSTILE, "torch": HOSTILE}),
        calibration=text,
        scope=HOSTILE,
        walk=HOSTILE,
        blocks=(BlockReport(index=0, name=HOSTILE, seconds=1.0, sites=(site,)),),
        quality=(report.quality[0].model_copy(update={"text": text}),),
        latency=report.latency.model_copy(update={"device": HOSTILE, "note": HOSTILE}),
        stages=(report.stages[0].model_copy(update={"name": HOSTILE}),),
        warnings=(HOSTILE,),
        out=HOSTILE,
    )


def bare_report() -> Report:
    """A report of a job that measured and wrote nothing."""
    return sample_report(
        quality=(), latency=None, calibration=None, stages=(), warnings=(), out=None, checkpoint_bytes=None, blocks=()
    )


def test_page_shows_every_number() -> None:
    """Every figure of the sample report is on the page."""
    text = Page(render_html(sample_report())).text
    for figure in (
        *("20.97", "29.31", "1.40x", "0.3127", "74.21 %", "2048", "146", "299,008"),
        *("26.42", "34.01", "1.29x", "0.2744", "76.03 %", "256", "524,288"),
        *("50.10 %", "14.42 %", "218,562,560", "62,914,560", "1 min 57 s", "427.77 MiB", "416.88 MiB"),
        *("61,250", "61,012", "60,331 to 62,016", "1.00x", "quartiles overlap", "42.4", "45.6", "1.08x", "10 repeats"),
        *("52.00", "47.50", "0.0194", "0.0284", "3.2 s", "1 min 25 s", "2.10 GiB", "5.00 GiB"),
        *("128 × 2048", "262,144", "c1899de289a04d12100db370d81485cdf75e47ca"),
        *("NVIDIA H200", "16", "0.1.0", "2.9.1", "5.3.0", "3.11.9", "Degraded but usable"),
        "llmprune prune Qwen/Qwen3-0.6B --method sparsegpt --eval wikitext2 --eval c4 --seed 7 --out pruned/qwen3-0.6b",
        "Zeros stored in dense tensors bring neither speed nor smaller files by themselves",
    ):
        assert figure in text, figure
    for item in sample_report().quality:
        assert item.text.sha256 in text


def test_page_loads_nothing() -> None:
    """No image, no stylesheet, no address, and of scripts only the one that the policy names: the page is one file."""
    html = render_html(sample_report(num_experts=4))
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "iframe", "object", "embed", "form"})
    ((script,), (policy,)) = re.findall(r"<script>(.*)</script>", html, re.DOTALL), re.findall(r"script-src '([^']+)'", html)
    assert policy == f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
    assert [attributes["href"] for tag, attributes in page.tags if tag == "link"] == ["data:,"]
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|@import|url\(", html)


def test_page_is_accessible() -> None:
    """One h1, a caption per table, a scope per header cell, a label per picture and scrolling region."""
    page = Page(render_html(sample_report(num_experts=4)))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("table") == tags.count("caption") == 6
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if attributes.get("role") in ("img", "region"))
    assert ("html", {"lang": "en"}) in page.tags


def test_hostile_text_is_inert_on_the_page() -> None:
    """A model named like a script stays text, wherever it appears, and keeps its characters."""
    html = render_html(hostile_report())
    page = Page(html)
    assert html.count("<script") == [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count("<script>alert(1)</script>") > 10
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_page_shows_a_benchmark() -> None:
    """Verdict, speeds as bars with their numbers beside them, bandwidth, memory, layers with picks, protocol and notes."""
    page = Page(render_html(sample_report(benchmark=sample_benchmark(reasons=("Decode is launch-bound.",)))))
    for figure in (
        *("Faster on NVIDIA H200", "decode at batch 1 1.50x, decode at batch 16 1.28x", "Decode is launch-bound."),
        *("42,000", "40,000", "41,580 to 42,420", "0.95x", "360.0", "240.0", "1.50x", "CUDA graph", "20 repeats"),
        *("3,240.0 81 %", "3,600.0 90 %", "4,000.0 GB/s", "13.97 GiB", "8.38 GiB", "7.36 GiB", "9.31 GiB"),
        *("64 × 2:4, 14,336 × 4,096", "30.2 µs", "17.9 µs", "1.69x packed", "0.83x dense", "model.layers.0.bitmask"),
        *("both models taking turns; CUDA graphs", "32 tokens after 128", "1 min 01 s"),
        "Prefill stops at the model's maximum of 2048 tokens (asked: 8192).",
    ):
        assert figure in page.text, figure
    bars = [attributes for tag, attributes in page.tags if tag == "i" and "--w" in (attributes.get("style") or "")]
    assert [bar["style"] for bar in bars[:4]] == ["--w:1.000", "--w:0.952", "--w:0.667", "--w:1.000"]
    assert all(bar.get("aria-hidden") == "true" for bar in bars) and len(bars) == 6


def test_page_with_a_benchmark_is_one_accessible_file() -> None:
    """A caption per table, a scope per header, a label per region, nothing to load, nothing to execute."""
    html = render_html(sample_report(benchmark=sample_benchmark()))
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") == 9
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if attributes.get("role") in ("img", "region"))
    assert tags.count("script") == 1 and not re.search(r"https?:|@import|url\(", html)


def test_page_with_a_benchmark_that_measured_little() -> None:
    """Without points, layers or bandwidth there are no holes."""
    benchmark = sample_benchmark()
    assert benchmark.dense is not None
    subject = benchmark.subject.model_copy(update={"speeds": (point("decode", 1, 32, 5.0, repeats=1),), "peak_bytes": None})
    dense = benchmark.dense.model_copy(update={"speeds": (point("decode", 1, 32, 4.0, repeats=1),)})
    changes: dict[str, Any] = {"subject": subject, "dense": dense, "layers": (), "notes": ()}
    text = Page(render_html(sample_report(benchmark=sample_benchmark(**changes)))).text
    assert "1.25x too few runs" in text and "None" not in text
    changes["dense"] = None
    text = Page(render_html(sample_report(benchmark=sample_benchmark(**changes)))).text
    assert "decode at batch 1 5 tokens/s" in text and "None" not in text


def test_hostile_names_in_a_benchmark() -> None:
    """On the page and in the card they stay text."""
    kind = sample_benchmark().layers[0].model_copy(update={"example": HOSTILE, "format": HOSTILE})
    environment = sample_report().environment.model_copy(update={"device": HOSTILE})
    hostile = sample_benchmark(layers=(kind,), notes=(HOSTILE,), reasons=(HOSTILE,), environment=environment)
    html = render_html(sample_report(benchmark=hostile))
    assert [tag for tag, _ in Page(html).tags].count("script") == html.count("<script") == 1
    tokens = (
        MarkdownIt("commonmark")
        .enable("table")
        .parse(render_card(sample_report(benchmark=hostile), "a/b", None).split("---\n", 2)[2])
    )
    kinds = Counter(child.type for token in tokens for child in (token, *(token.children or ())))
    assert (kinds["table_open"], kinds["heading_open"], kinds["fence"]) == (3, 6, 2)
    assert {"html_block", "html_inline", "link_open", "image", "hr"}.isdisjoint(kinds)


def test_card_shows_a_benchmark() -> None:
    """Only where there is one: speeds, ratios and the device they were measured on."""
    card = render_card(sample_report(benchmark=sample_benchmark()), "a/b", None)
    for line in (
        "| prefill | 2,048 tokens | 42,000 | 40,000 | 0.95x |",
        "| decode | batch 1 | 240.0 | 360.0 | 1.50x |",
        "Medians, measured on NVIDIA H200.",
    ):
        assert line in card, line
    assert "## Speed" not in render_card(sample_report(), "a/b", None)


def test_missing_parts_are_named() -> None:
    """A report without measurements says so instead of leaving holes."""
    text = Page(render_html(bare_report())).text
    for sentence in (
        *("Not measured", "No text was evaluated.", "Speed was not measured.", "No calibration text was used."),
        *("No stage was recorded.", "No block was pruned.", "not written"),
    ):
        assert sentence in text, sentence
    assert "None" not in text


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_perplexity_that_is_not_finite(value: float) -> None:
    """An overflowed model is broken, and its perplexity reads 'not finite'."""
    first, second = sample_report().quality
    broken = first.model_copy(update={"perplexity_pruned": value, "kl": value})
    report = sample_report(quality=(second, broken))
    page = Page(render_html(report))
    assert worst(report.quality) is broken
    assert "20.97 → not finite" in page.text
    assert any("broken" in (attributes.get("class") or "") for _, attributes in page.tags)
    assert "not finite" in render_card(report, "a/b", None)


def test_model_measured_alone() -> None:
    """Where only the pruned model was measured there is a perplexity and no verdict."""
    alone = sample_report().quality[0].model_copy(update={"perplexity_dense": None, "kl": None, "top1_agreement": None})
    report = sample_report(quality=(alone,))
    text = Page(render_html(report)).text
    assert "– 29.31 – – –" in text
    assert "Not measured" in text
    assert "| – | 29.31 | – | – | – |" in render_card(report, "a/b", None)


def test_dense_only_measurement() -> None:
    """Where only the dense model was measured the pruned columns hold a dash."""
    report = sample_report()
    assert report.latency is not None
    dense = report.quality[0].model_copy(update={"perplexity_pruned": None, "kl": None, "top1_agreement": None})
    text = Page(render_html(sample_report(quality=(dense,), latency=report.latency.model_copy(update={"pruned": ()})))).text
    assert "20.97 – – – –" in text
    assert "Not measured" in text
    assert "None" not in text


@pytest.mark.parametrize(("num_blocks", "num_experts"), [(80, 0), (48, 128)])
def test_large_reports_stay_small(num_blocks: int, num_experts: int) -> None:
    """80 dense blocks and 48 blocks of 128 experts render in under 2 s and 2 MB."""
    report = sample_report(num_blocks=num_blocks, num_experts=num_experts)
    start = time.process_time()
    html = render_html(report)
    assert time.process_time() - start < 2
    assert len(html.encode()) < 2_000_000
    page = Page(html)
    columns = len(make_grid(report.blocks).labels)
    assert sum(tag == "rect" and "fill-opacity" in attributes for tag, attributes in page.tags) == num_blocks * (columns + 1)
    errors = num_blocks * (4 if num_experts else 7)
    assert sum(attributes.get("class") == "c" for _, attributes in page.tags) == num_blocks * columns + errors


def test_experts_share_a_column_and_list_their_tokens() -> None:
    """Fused experts become one cell per parameter; parameters with the same token counts share a list."""
    report = sample_report(num_blocks=2, num_experts=8)
    grid = make_grid(report.blocks)
    assert grid.labels == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    cell = grid.rows[0].cells[4]
    assert cell is not None and len(cell.sites) == 8
    (lists,) = expert_tokens(grid, grid.rows[0])
    assert lists.labels == ("gate_up_proj", "down_proj")
    assert [index for index, _ in lists.tokens] == list(range(8))
    assert lists.num_unseen == 1
    text = Page(render_html(report)).text
    assert "Block 1, gate_up_proj, down_proj: 8 experts, 1 saw no token" in text
    assert "4 sites were scored by weights alone (no calibration token reached it)" in text


def grid_of(*names: str) -> Any:
    """The grid of one block with equal sites of these names."""
    sites = tuple(SiteReport(name=f"h.0.{name}", shape=(4, 4), numel=16, num_zeros=8) for name in names)
    return make_grid((BlockReport(index=0, name="h.0", seconds=0.0, sites=sites),))


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("attn.c_proj", "mlp.c_proj", "mlp.c_fc"), ("attn.c_proj", "mlp.c_proj", "c_fc")),
        (("mlp.experts.0.w1", "mlp.experts.0.w2", "mlp.experts.1.w1", "mlp.experts.1.w2"), ("w1", "w2")),
        (("mlp.experts.down_proj.0", "mlp.experts.down_proj.1", "mlp.shared_experts.down_proj"),
         ("experts.down_proj", "shared_experts.down_proj")),
        (("moe.input_linear.0", "moe.input_linear.1"), ("input_linear",)),
        (("q_proj", "self.q_proj"), ("q_proj", "self.q_proj")),
    ],
)  # fmt: skip
def test_column_labels(names: tuple[str, ...], labels: tuple[str, ...]) -> None:
    """Labels are the shortest endings that tell columns apart; experts of a list or of a 3-D parameter are merged."""
    grid = grid_of(*names)
    assert grid.labels == labels
    assert sum(len(group.sites) for _, group in grid.totals) == len(names)


def test_blocks_with_different_sites_leave_cells_empty() -> None:
    """A dense first layer and mixture layers share one table."""
    blocks = (sample_report(num_blocks=1).blocks[0], sample_report(num_blocks=2, num_experts=2).blocks[1])
    grid = make_grid(blocks)
    assert grid.labels[4:] == ("gate_proj", "up_proj", "mlp.down_proj", "gate_up_proj", "experts.down_proj")
    assert [cell is None for cell in grid.rows[0].cells[4:]] == [False, False, False, True, True]
    assert [cell is None for cell in grid.rows[1].cells[4:]] == [True, True, True, False, False]


def _luminance(color: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    """Every text colour has a contrast of at least 4.5 (WCAG AA) on the grounds it appears on."""
    css = (TEMPLATES / "report.html.j2").read_text(encoding="utf-8").split("@media (prefers-color-scheme: dark)")[scheme]
    colors = {
        name: tuple(int(value[i : i + 2], 16) for i in (0, 2, 4)) for name, value in re.findall(r"--([\w-]+): #(\w{6})", css)
    }
    heat = re.search(r"--heat: (\d+), (\d+), (\d+)", css)
    assert heat is not None and len(colors) == 14
    colors["heat"] = tuple(int(value) for value in heat.groups())
    pairs = [("ink", ground) for ground in ("ground", "panel", "heat")] + [("muted", "ground"), ("muted", "panel")]
    pairs += [(f"{status}-ink", status) for status in ("good", "degraded", "broken", "unmeasured")]
    for ink, ground in pairs:
        assert _contrast(colors[ink], colors[ground]) >= 4.5, (ink, ground)


def parse_command(command: str) -> tuple[PruneConfig, str | None]:
    """What a command line means: the flags are the field names with dashes."""
    program, verb, model, *words = shlex.split(command)
    assert (program, verb) == ("llmprune", "prune")
    values: dict[str, Any] = {"model": model}
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if name in ("latency", "trust_remote_code"):
            values[name] = True
        elif name.startswith("no_"):
            values[name.removeprefix("no_")] = () if name == "no_eval" else False
        elif name in ("eval", "skip"):
            values[name] = (*values.get(name, ()), words.pop(0))
        else:
            values[name] = words.pop(0)
    out = values.pop("out", None)
    return PruneConfig(**values), out


@pytest.mark.parametrize(
    "config",
    [
        PruneConfig(),
        PruneConfig(sparsity=0.625, skip=("*.down_proj", "a b'c"), eval=("wikitext2", "c4"), latency=False),
        PruneConfig(pattern="2:4", method="sparsegpt", damping=0.02, scope="block", sequential="block"),
        PruneConfig(pattern="1:4", num_samples=8, seq_len=512, batch_size=2, max_eval_tokens=4096, seed=3),
        PruneConfig(eval=(), trust_remote_code=True, revision="main", device="cuda:1", dtype="float16"),
        PruneConfig(model="/models/my model; rm -rf $HOME", calibration="hf:a/b:c:train:text"),
    ],
)
@pytest.mark.parametrize("out", [None, "out dir/x"])
def test_command_line_round_trips(config: PruneConfig, out: str | None) -> None:
    """Reading the command line gives the same config and output."""
    assert parse_command(command_line(config, out)) == (config, out)


def test_command_line_is_short() -> None:
    """Defaults are left out, and an n:m pattern carries its own sparsity."""
    assert command_line(PruneConfig()) == "llmprune prune demo"
    assert command_line(PruneConfig(pattern="1:4", latency=False)) == "llmprune prune demo --pattern 1:4 --no-latency"


def front_matter(card: str) -> dict[str, Any]:
    """The YAML at the head of a card."""
    empty, head, _ = card.split("---\n", 2)
    assert empty == ""
    loaded: dict[str, Any] = yaml.safe_load(head)
    return loaded


def test_card_front_matter() -> None:
    """The hub finds base model, licence, library, task and tags."""
    assert front_matter(render_card(sample_report(), "Qwen/Qwen3-0.6B", "apache-2.0")) == {
        "base_model": "Qwen/Qwen3-0.6B",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmprune", "pruned", "sparsegpt"],
    }


@pytest.mark.parametrize("path", ["/home/me/models/secret-7b", "demo", "./out/secret-7b", "../a/secret-7b"])
def test_card_of_a_local_model(path: str) -> None:
    """A directory is no base model for the hub, and only its last part is shown."""
    report = sample_report(config=PruneConfig(model=path, device="cuda:1"))
    card = render_card(report, path, None)
    assert {"base_model", "license"}.isdisjoint(front_matter(card))
    assert "/secret-7b" not in card
    assert f"llmprune prune {path.rsplit('/')[-1]}\n" in card


def test_card_shows_the_numbers() -> None:
    """Quality, sparsity, loading and reproduction are in the card."""
    card = render_card(sample_report(), "Qwen/Qwen3-0.6B", None)
    for text in (
        "| wikitext2 (test) | 146 × 2048 | 20.97 | 29.31 | 1.40x | 0.3127 | 74.21 % |",
        "| c4 (validation) | 256 × 2048 | 26.42 | 34.01 | 1.29x | 0.2744 | 76.03 % |",
        "| `down_proj` | 4 | 12,582,912 | 50.25 % |",
        "| **All pruned sites** | 28 | 62,914,560 | 50.10 % |",
        "| 218,562,560 | 14.42 % |",
        'AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")',
        "llmprune prune Qwen/Qwen3-0.6B --method sparsegpt --eval wikitext2 --eval c4 --seed 7",
        "neither speed nor a smaller file",
    ):
        assert text in card, text


def test_card_does_not_depend_on_the_run() -> None:
    """Two runs that differ only in time, machine, walk, resumption and output give the same bytes."""
    one = sample_report()
    assert one.latency is not None
    two = one.model_copy(
        update={
            "blocks": tuple(block.model_copy(update={"seconds": 99.0}) for block in one.blocks),
            "stages": (),
            "latency": None,
            "walk": "two passes, 4 sequences at once",
            "resumed": True,
            "out": "elsewhere",
            "warnings": ("the GPU was busy",),
            "environment": one.environment.model_copy(update={"device": "cpu", "num_threads": 2}),
            "quality": tuple(item.model_copy(update={"seconds_dense": 5.0, "seconds_pruned": 6.0}) for item in one.quality),
            "config": one.config.model_copy(update={"device": "cuda:3"}),
        }
    )
    assert render_card(one, "a/b", "mit") == render_card(two, "a/b", "mit")
    assert "H200" not in render_card(one, "a/b", "mit")


def test_hostile_text_is_inert_in_the_card() -> None:
    """Names cannot add front matter, HTML, links, table columns or headings, nor close a code block."""
    card = render_card(hostile_report(), HOSTILE + "\n```\n", HOSTILE)
    assert front_matter(card)["license"] == HOSTILE
    assert front_matter(card)["tags"][2] == HOSTILE
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    tokens += [child for token in tokens for child in token.children or ()]
    kinds = Counter(token.type for token in tokens)
    assert kinds["fence"] == 2
    assert kinds["heading_open"] == 5
    assert kinds["table_open"] == 2
    assert kinds["th_open"] == 7 + 4
    assert {"html_block", "html_inline", "link_open", "image", "hr"}.isdisjoint(kinds)


def test_bare_card() -> None:
    """A card without measurements says so."""
    card = render_card(bare_report(), "a/b", None)
    assert "No text was evaluated." in card
    assert "Calibration: none" in card
    assert "None" not in card


def test_remote_code_is_in_the_loading_example() -> None:
    """A model that needs its own code is loaded with it."""
    report = sample_report(config=PruneConfig(model="a/b", trust_remote_code=True))
    assert "trust_remote_code=True" in render_card(report, "a/b", None)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(0.5), "50.00 %"),
        (percent(None), "–"),
        (number(1234.567), "1,234.57"),
        (number(3.21e7), "3.21e+07"),
        (number(float("nan")), "not finite"),
        (times(1.0512), "1.05x"),
        (times(float("inf")), "not finite"),
        (small(0.04), "0.0400"),
        (small(0.0), "0"),
        (small(1.5e-6), "1.50e-06"),
        (small(1234.0), "1.23e+03"),
        (rate(999.96), "1,000.0"),
        (rate(61_250.0), "61,250"),
        (brief(17.94e-6), "17.9 µs"),
        (brief(2.5e-7), "0.25 µs"),
        (brief(0.00456), "4.56 ms"),
        (brief(0.25), "250 ms"),
        (brief(12.0), "12.0 s"),
        (duration(0.04), "0.0 s"),
        (duration(59.96), "1 min 00 s"),
        (duration(3599.7), "1 h 00 min"),
        (duration(7620), "2 h 07 min"),
        (size(512), "512 B"),
        (size(1536), "1.50 KiB"),
        (size(3 * 1024**5), "3072.00 TiB"),
        (markdown("a_b *c* <i> x|y https://e.test"), r"a_b \*c\* &lt;i> x\|y https:\//e.test"),
    ],
)
def test_formatting(shown: str, expected: str) -> None:
    """Numbers have a fixed number of digits, and units a reader knows."""
    assert shown == expected


def test_unescaped_page_keeps_the_command_whole() -> None:
    """The command on the page can be copied: it is the command line, character for character."""
    report = sample_report(config=PruneConfig(model="a/b", skip=("*.down_proj", "it's <&>")))
    match = re.search(r"<pre>(.*?)</pre>", render_html(report), re.DOTALL)
    assert match is not None
    assert unescape(match[1]) == command_line(report.config, report.out)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "wanda"),
        ({"method": "icbs", "reconstruct": True}, "wanda + icbs + reconstruct"),
        ({"method": "alps", "allocation": "dp"}, "alps + dp"),
        ({"effort": "best", "pattern": "2:4"}, "alps + permute + reconstruct"),
    ],
)
def test_a_recipe_names_what_was_done(fields: dict[str, Any], words: str) -> None:
    """The method first, then what came with it, in the order it happens."""
    assert recipe(PruneConfig.build(**fields)) == words


@pytest.mark.parametrize(("fields", "is_told"), [({}, True), ({"effort": "balanced"}, False)])
def test_a_broken_model_is_told_what_helps(fields: dict[str, Any], is_told: bool) -> None:
    """The preset, unless the job has reconstructed already."""
    [quality, *_] = sample_report().quality
    broken = quality.model_copy(update={"perplexity_dense": 10.0, "perplexity_pruned": 50.0})
    verdict = sample_report().model_copy(update={"quality": (broken,), "config": PruneConfig.build(**fields)}).verdict
    assert verdict.status == "broken" and "Lower the sparsity" in verdict.text
    assert ("--effort best" in verdict.text) == is_told
