"""The atlas's page: what it holds, its size, and that it works in a browser."""

import base64
import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest

from edl_jax.analysis import atlas_data, atlas_page
from tests.analysis.browser import EXECUTABLE, Browser
from tests.analysis.synthetic_runs import synthetic_run

HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror=alert>"


def data_of(page: bytes) -> dict:
  found = re.search(
    rb'<script id="data" type="application/json">(.*?)</script>',
    page,
    re.DOTALL,
  )
  return json.loads(found[1])


def unpacked(packed: dict) -> np.ndarray:
  numbers = np.frombuffer(
    base64.b64decode(packed["data"]), f"<u{packed['bits'] // 8}"
  )
  return numbers.reshape(packed["shape"]) * packed["scale"]


def test_largest_page_is_under_five_megabytes():
  names = [f"english/a topic of the web {i}" for i in range(49)]
  # The example's tokens are as many as `collect` would take.
  elements = 24 * 49 * 8
  runs = [
    synthetic_run(
      num_layers=24,
      num_experts=64,
      names=names,
      active=8,
      vocabulary=30_000,
      example_tokens=atlas_data.example_length(elements),
      name=f"run {seed}",
      seed=seed,
    )
    for seed in (0, 1)
  ]
  assert atlas_data.example_length(elements) >= 16
  assert 2_000_000 < len(atlas_page.build_page(runs[:1])) < 3_000_000
  assert len(atlas_page.build_page(runs)) < 5_000_000


@pytest.mark.parametrize("bits", [8, 16])
def test_packed_figures(bits):
  values = np.random.default_rng(0).exponential(size=(3, 4, 5))
  values[0, 0, 0], values[0, 0, 1] = 0, 1e-9
  packed = atlas_page.packed(values, bits)
  got = unpacked(packed)
  half = values.max() / (2**bits - 1) / 2
  np.testing.assert_allclose(got, values, atol=2.01 * half)
  np.testing.assert_allclose(
    got[values > 2 * half], values[values > 2 * half], atol=1.01 * half
  )
  assert got[0, 0, 0] == 0 < got[0, 0, 1]
  integers = np.arange(2**bits).reshape(2, -1)
  np.testing.assert_array_equal(
    unpacked(atlas_page.packed(integers, bits)), integers
  )
  assert (unpacked(atlas_page.packed(np.zeros(3), bits)) == 0).all()


def test_page_holds_the_figures():
  run = synthetic_run(3, 5, ["a/x", "a/y", "z"])
  page = data_of(atlas_page.build_page([run]))
  (content,) = page["runs"]
  assert content["domains"] == ["a/x", "a/y", "z"]
  load_LE = run.assignments_LDE.sum(1)
  assert content["load"] == load_LE.tolist()
  assert content["main"][0][-1] == -1
  assert content["main"][1] == run.assignments_LDE[1].argmax(0).tolist()
  share_LDE = run.assignments_LDE / run.assignments_LDE.sum(2, keepdims=True)
  np.testing.assert_allclose(unpacked(content["share"]), share_LDE, atol=1e-5)
  np.testing.assert_allclose(
    unpacked(content["next"]),
    run.next_LEE / np.maximum(load_LE[:-1, :, None], 1),
    rtol=1e-3,
    atol=1e-5,
  )
  for layer, expert in ((0, 0), (2, 3)):
    flat = content["typical"][layer][expert]
    assert [
      (page["texts"][place], count)
      for place, count in zip(flat[::2], flat[1::2])
    ] == [(run.token_texts[t], n) for t, n in run.typical[layer][expert]]
    context = run.contexts[layer][expert][0]
    _, domain, position, places = content["contexts"][layer][expert][0]
    assert (domain, position) == (context.domain, context.position)
    assert [page["texts"][place] for place in places] == [
      run.token_texts[token] for token in context.tokens
    ]
  example = content["examples"][1]
  np.testing.assert_array_equal(
    unpacked(example["experts"]), run.examples[1].expert_LTA
  )
  np.testing.assert_allclose(
    unpacked(example["probabilities"]),
    run.examples[1].probability_LTA,
    atol=0.5 / 255,
  )


class Tags(html.parser.HTMLParser):
  """Lists the elements of a page, and the addresses that they name."""

  def __init__(self, page: bytes):
    super().__init__()
    self.names, self.addresses = [], []
    self.feed(page.decode())

  def handle_starttag(self, tag, attrs):
    self.names.append(tag)
    self.addresses += [v for k, v in attrs if k in ("src", "href", "action")]


def test_text_from_the_data_adds_no_element():
  plain = Tags(atlas_page.build_page([synthetic_run(2, 4, ["a", "b"])]))
  run = synthetic_run(
    2, 4, [HOSTILE.replace("/", "_"), "b"], name=HOSTILE, texts={0: HOSTILE}
  )
  page = atlas_page.build_page([run])
  assert Tags(page).names == plain.names
  assert data_of(page)["runs"][0]["name"] == HOSTILE
  # Nothing is fetched: all addresses are places in the page.
  assert all(address.startswith("#") for address in Tags(page).addresses)
  assert b"{{" not in page


def test_text_that_names_a_part_of_the_frame_is_left_alone():
  run = synthetic_run(2, 4, ["a", "b"], name="{{program}}")
  assert data_of(atlas_page.build_page([run]))["runs"][0]["name"] == (
    "{{program}}"
  )


def test_a_domain_without_text_has_no_example():
  run = synthetic_run(2, 4, ["a", "b"])
  run = dataclasses.replace(run, examples=[None, run.examples[1]])
  content = data_of(atlas_page.build_page([run]))["runs"][0]
  assert content["examples"][0] is None


# --- In a browser ------------------------------------------------------------

in_browser = [
  pytest.mark.slow,
  pytest.mark.skipif(
    EXECUTABLE is None, reason="no chromium: apt-get install chromium"
  ),
]


@pytest.fixture(scope="module")
def browser():
  with Browser() as started:
    started.resize(1400, 900)
    yield started


RUN = synthetic_run(3, 6, ["a/x", "a/y", "z"], name="first")
OTHER = synthetic_run(2, 4, ["a/x", "a/y", "z"], name="second", seed=1)


@pytest.fixture
def opened(browser, tmp_path):
  """Opens a page of runs from the disk; it must log nothing by the end."""

  def open_page(*runs):
    path = tmp_path / "atlas.html"
    path.write_bytes(atlas_page.build_page(runs))
    browser.open(path)
    return browser

  yield open_page
  browser.evaluate("0")
  assert browser.errors() == []
  assert set(browser.requests()) == {(tmp_path / "atlas.html").as_uri()}


def columns(browser) -> list[int]:
  """Returns the experts in the order of the columns."""
  return browser.evaluate(
    """[...document.querySelectorAll("#experts thead button")]
      .map((button) => Number(button.textContent))"""
  )


def shown_tip(browser) -> str | None:
  return browser.evaluate("tip.hidden ? null : tip.textContent")


def percents(text: str) -> list[float]:
  return [float(x) for x in re.findall(r"([\d.]+)%", text)]


def nats(browser) -> float:
  return float(re.search(r"JSD ([\d.]+) nats", shown_tip(browser))[1])


def choose(browser, setting: str, value: str) -> None:
  """Chooses an option of a select as its user would: by an event."""
  browser.evaluate(
    f"""(() => {{
      const found = document.getElementById({json.dumps(setting)});
      found.value = {json.dumps(value)};
      if (found.value !== {json.dumps(value)}) throw new Error("no option");
      found.dispatchEvent(new Event("input", {{bubbles: true}}));
      found.dispatchEvent(new Event("change", {{bubbles: true}}));
    }})()"""
  )


class TestBrowser:
  pytestmark = in_browser

  def test_sorting(self, opened):
    page = opened(RUN)
    count_DE = RUN.assignments_LDE[1]
    load_E, share_DE = count_DE.sum(0), count_DE / count_DE.sum(1)[:, None]
    choose(page, "layer", "1")
    main_E = count_DE.argmax(0)
    assert columns(page) == sorted(
      range(6), key=lambda e: (main_E[e], -load_E[e])
    )
    choose(page, "expert-order", "load")
    assert columns(page) == np.argsort(-load_E).tolist()
    choose(page, "expert-order", "number")
    assert columns(page) == list(range(6))
    # A domain's name sorts by it, and keeps the focus.
    page.point('[data-key="0 domain 2"]', click=True)
    assert columns(page) == np.argsort(-share_DE[2]).tolist()
    assert page.evaluate("document.activeElement.textContent") == "z"
    assert page.evaluate("find('expert-order').value") == "2"
    # Domains by the share of a chosen expert.
    page.point('[data-key="0 expert 3"]', click=True)
    choose(page, "domain-order", "expert")
    rows = page.evaluate(
      """[...document.querySelectorAll("#experts tbody th")]
        .map((cell) => cell.textContent)"""
    )
    order = np.argsort(-share_DE[:, 3])
    assert rows == [RUN.taxonomy.names[d] for d in order]
    assert page.evaluate("find('expert').value") == "3"
    assert "Expert 3" in page.evaluate("find('tokens').textContent")

  def test_hovering_and_the_keyboard_give_numbers(self, opened):
    page = opened(RUN)
    choose(page, "layer", "2")
    choose(page, "expert-order", "number")
    count_DE = RUN.assignments_LDE[2]

    def check_tip(d, e):
      tip = shown_tip(page)
      assert tip.startswith(f"{RUN.taxonomy.names[d]}, expert {e}\n")
      assert percents(tip) == pytest.approx(
        [
          100 * count_DE[d, e] / total
          for total in (count_DE[d].sum(), count_DE[:, e].sum())
        ]
        + [100 * count_DE[:, e].sum() / RUN.tokens_D.sum() / 2],
        rel=6e-3,
      )
      main = RUN.taxonomy.names[count_DE[:, e].argmax()]
      assert tip.endswith(f"main domain {main}")

    assert shown_tip(page) is None
    page.point("#experts tbody tr:nth-child(2) td:nth-of-type(4)")
    check_tip(1, 3)
    page.press("Escape")
    assert shown_tip(page) is None
    # One cell of a table takes the focus; the arrow keys move it.
    assert (
      page.evaluate(
        "document.querySelectorAll('#experts td[tabindex=\"0\"]').length"
      )
      == 1
    )
    page.evaluate("document.querySelector('#experts td').focus()")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "End", "ArrowLeft"):
      page.press(key)
    check_tip(2, 4)
    page.press("ArrowDown")
    assert "expert 4" in shown_tip(page)

  def test_tokens_pairs_load_and_text(self, opened):
    page = opened(RUN)
    assert (
      page.evaluate("document.querySelectorAll('#load td.dead').length") == 1
    )
    page.point("#load td.dead")
    assert "layer 0, expert 5\ndead" in shown_tip(page)
    example = RUN.examples[0]
    page.point("#text .text > span:nth-of-type(3)")
    e = example.expert_LTA[0, 2, 0]
    assert f"expert {e}: " in shown_tip(page).splitlines()[0]
    assert percents(shown_tip(page)) == pytest.approx(
      100 * example.probability_LTA[0, 2], abs=0.3
    )
    choose(page, "expert-order", "number")
    page.point("#pairs tbody tr:nth-child(1) td:nth-of-type(2)")
    share = RUN.together_LEE[0, 0, 1] / RUN.together_LEE[0, 0, 0]
    assert percents(shown_tip(page))[0] == pytest.approx(100 * share, rel=0.01)
    token, count = RUN.typical[0][0][0]
    first = page.evaluate(
      "document.querySelector('#tokens .row tbody tr').textContent"
    )
    assert first == f"{RUN.token_texts[token]}{count}"

  def test_distances(self, opened):
    page = opened(RUN)
    assert (
      page.evaluate("document.querySelectorAll('#distances circle').length")
      == 3
    )
    page.point("#distances tbody tr:nth-child(1) td:nth-of-type(3)")
    assert nats(page) == pytest.approx(RUN.divergence_LDD[0, 0, 2], abs=1e-4)
    choose(page, "map-scope", "mean")
    page.point("#distances tbody tr:nth-child(1) td:nth-of-type(3)")
    assert nats(page) == pytest.approx(
      RUN.divergence_LDD[:, 0, 2].mean(), abs=1e-4
    )

  def test_two_runs_side_by_side(self, opened):
    page = opened(RUN, OTHER)
    left, right = page.evaluate(
      """[...document.querySelectorAll("#experts .run")]
        .map((run) => run.getBoundingClientRect().left)"""
    )
    assert left < right
    choose(page, "layer", "2")
    assert "no such layer" in page.evaluate(
      "document.querySelectorAll('#experts .run')[1].textContent"
    )
    choose(page, "layer", "1")
    assert "no such layer" not in page.evaluate("find('experts').textContent")

  def test_hostile_text_stays_text(self, opened):
    names = [HOSTILE.replace("/", "_"), "b"]
    run = synthetic_run(
      2, 4, names, name=HOSTILE, texts=dict.fromkeys(range(40), HOSTILE)
    )
    page = opened(run)
    assert page.evaluate("window.broken") is None
    assert page.evaluate("document.querySelectorAll('main img').length") == 0
    assert HOSTILE in page.evaluate("find('tokens').textContent")

  def test_dark_and_light_follow_the_system_and_the_switch(self, opened):
    def background():
      return sum(
        map(
          int,
          re.findall(
            r"\d+",
            page.evaluate("getComputedStyle(document.body).backgroundColor"),
          )[:3],
        )
      )

    page = opened(RUN)
    page.prefer("dark")
    assert background() < 200
    page.prefer("light")
    assert background() > 600
    page.point("#theme", click=True)
    assert background() < 200
    assert page.evaluate("find('theme').getAttribute('aria-pressed')") == "true"

  @pytest.mark.parametrize("scheme", ["light", "dark"])
  def test_text_has_contrast(self, opened, scheme):
    """WCAG 2.2 asks for 4.5 between text and what lies behind it."""
    page = opened(RUN, OTHER)
    page.prefer(scheme)
    pairs = page.evaluate(CONTRASTS)
    assert len(pairs) > 300
    assert [pair for pair in pairs if pair[0] < 4.5] == []

  def test_narrow_windows_do_not_scroll_sideways(self, opened):
    page = opened(RUN, OTHER)
    page.resize(360, 700)
    try:
      width = page.evaluate("document.documentElement.scrollWidth")
    finally:
      page.resize(1400, 900)
    assert width <= 360

  def test_everything_that_acts_has_a_name(self, opened):
    page = opened(RUN, OTHER)
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "combobox", "slider", "grid", "table", "link", "region")
    named = [
      (node["role"]["value"], node.get("name", {}).get("value"))
      for node in nodes
      if node.get("role", {}).get("value") in roles
    ]
    assert {role for role, _ in named} == set(roles)
    assert [pair for pair in named if not pair[1]] == []
    page.evaluate("document.activeElement.blur()")
    page.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"


# The contrast of every text with the nearest background behind it, drawn on a
# canvas, which knows all notations of colours.
CONTRASTS = """(() => {
  const context = document.createElement("canvas")
    .getContext("2d", {willReadFrequently: true});
  const rgba = (color) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => rgba(color).slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const walker = document.createTreeWalker(
    document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const own = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !own.checkVisibility()) continue;
    if (own.closest("script, style, option, noscript, svg")) continue;
    let behind = own;
    while (rgba(getComputedStyle(behind).backgroundColor)[3] < 255) {
      behind = behind.parentElement;
    }
    const [low, high] = [luminance(getComputedStyle(own).color),
      luminance(getComputedStyle(behind).backgroundColor)]
      .sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), walker.currentNode.data,
      own.className]);
  }
  return found;
})()"""
