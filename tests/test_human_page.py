"""The rating page in a real browser: keys, undo, blind sides, and texts that stay texts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from judges.human.records import Choice, first_is_left
from judges.human.server import serve, stop
from judges.human.store import Store

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_S = 60


class Page:
    """The page as one rater has it open."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url

    def until(self, holds: Callable[[], object], what: str) -> None:
        WebDriverWait(self.driver, WAIT_S, poll_frequency=0.02).until(lambda _: holds(), what)

    def open(self, rater: str) -> Page:
        """Open the page for the first time and give a name."""
        self.driver.get(self.url)
        self.ready()
        assert self.shown("welcome")
        self.driver.switch_to.active_element.send_keys(rater, Keys.ENTER)
        self.until(lambda: not self.shown("welcome"), "the name was taken")
        return self.ready()

    def ready(self) -> Page:
        busy = "return document.querySelector('main')?.ariaBusy"
        self.until(lambda: self.driver.execute_script(busy) == "false", "the page is ready")
        return self

    def press(self, *keys: str) -> Page:
        """Press keys one after the other, each when the page is ready for it."""
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()
            self.ready()
        return self

    def text(self, identifier: str) -> str:
        return str(self.driver.find_element(By.ID, identifier).get_property("textContent"))

    def shown(self, identifier: str) -> bool:
        return self.driver.find_element(By.ID, identifier).is_displayed()

    def sides(self) -> tuple[str, str]:
        return self.text("left-text"), self.text("right-text")

    def pressed(self, side: str) -> list[str]:
        found = self.driver.find_elements(
            By.CSS_SELECTOR, f"#{side}-quality button[aria-pressed=true]"
        )
        return [button.get_attribute("data-quality") for button in found]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store whose page is served, empty."""
    made = Store(tmp_path / "s.sqlite")
    serve(made, "127.0.0.1", 0)
    yield made
    stop(made)


@pytest.fixture
def page(store: Store, tmp_path: Path) -> Iterator[Callable[[str], Page]]:
    """Opens the page for a rater, in a browser of their own."""
    binary, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("no chromium and chromedriver on the PATH: make install-browser")
    drivers = []

    def open_page(rater: str) -> Page:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in (*FLAGS, f"--user-data-dir={tmp_path / rater}", "--window-size=1280,800"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
        drivers.append(driver)
        return Page(driver, serve(store, "127.0.0.1", 0).url).open(rater)

    yield open_page
    for driver in drivers:
        driver.quit()


def last(store: Store) -> tuple[int, Choice, int | None, int | None]:
    """The last rating: item, choice, quality of first and of second."""
    rating = store.ratings()[-1]
    return rating.item, rating.choice, rating.quality_first, rating.quality_second


def queue(store: Store, count: int) -> None:
    store.queue([(f"prompt {i}", f"one {i}", f"two {i}") for i in range(1, count + 1)])


def test_keys_answer_and_answers_are_in_the_file_at_once(store, page):
    queue(store, 6)
    ada = page("ada")
    keys = [Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, "t", "s", "S"]
    for i, (key, seen) in enumerate(
        zip(keys, ["left", "right", "tie", "tie", "skip", "skip"], strict=True), 1
    ):
        assert ada.text("prompt") == f"prompt {i}"
        first_left = ada.sides() == (f"one {i}", f"two {i}")
        assert first_left or ada.sides() == (f"two {i}", f"one {i}")
        ada.press(key)
        assert last(store) == (i, Choice.seen(seen, first_left), None, None)
        assert (store.ratings()[-1].left, len(store.ratings())) == (first_left, i)
        assert 0 < store.ratings()[-1].seconds < WAIT_S
    assert ada.shown("waiting")
    assert ada.text("counts") == "6 by you · 0 left for you · 4 / 6 done"


def test_digits_give_qualities_which_are_stored_with_the_preference(store, page):
    queue(store, 3)
    ada = page("ada")
    ada.press("2", "0")
    assert (ada.pressed("left"), ada.pressed("right")) == (["2"], ["5"])
    assert store.ratings() == [], "a quality alone is no answer"
    ada.press("4", "4", "5")
    assert ada.pressed("left") == ["5"]
    ada.press("0")
    assert ada.pressed("right") == [], "the same key again takes it back"
    ada.press("6", Keys.ARROW_LEFT)
    rating = store.ratings()[-1]
    assert (rating.quality_first, rating.quality_second) == ((5, 1) if rating.left else (1, 5))
    assert (ada.pressed("left"), ada.pressed("right")) == ([], []), "a new pair begins blank"
    shift_3 = ActionChains(ada.driver).key_down(Keys.SHIFT).send_keys("3").key_up(Keys.SHIFT)
    shift_3.perform()
    assert (ada.pressed("left"), ada.pressed("right")) == ([], ["3"])
    ada.driver.find_element(By.CSS_SELECTOR, "#left-quality [data-quality='4']").click()
    ada.driver.find_element(By.CSS_SELECTOR, "[data-verdict=right]").click()
    ada.ready()
    rating = store.ratings()[-1]
    assert (rating.item, rating.choice) == (2, Choice.seen("right", rating.left))
    assert (rating.quality_first, rating.quality_second) == ((4, 3) if rating.left else (3, 4))


def test_undo_withdraws_at_once_and_shows_the_pair_again(store, page):
    queue(store, 2)
    ada = page("ada").press("3", Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    assert ada.shown("waiting")
    ada.press("u")
    assert [rating.item for rating in store.ratings()] == [1]
    assert (ada.shown("pair"), ada.text("prompt")) == (True, "prompt 2")
    assert ada.text("status") == "Withdrawn: right is better. Answer again."
    ada.press("u")
    assert (store.ratings(), ada.text("prompt")) == ([], "prompt 1")
    assert ada.pressed("left") == ["3"], "what was said before is shown"
    ada.press(Keys.ARROW_DOWN)
    assert last(store)[:2] == (1, Choice.TIE)
    assert ada.text("prompt") == "prompt 2"
    ada.press("u", "u")
    assert (store.ratings(), ada.text("status")) == ([], "There is nothing to undo.")


ATTACKS = [
    "<script>document.title = 'hacked'</script>",
    "<img src=x onerror=\"document.title='hacked'\">",
    "</div></article><h1 id=pair>&lt;b&gt; &amp;</h1>",
    "{{7*7}} ${7*7} `'\"",
    "line one\n    indented\r\n\ttab \u202eright to left\u202c \u0000 end",
]


@pytest.mark.parametrize("form", ["text", "chat"])
def test_markup_is_shown_as_text_and_does_not_run(store, page, form):
    store.queue(
        [
            (
                [{"role": attack, "content": attack}] if form == "chat" else attack,
                f"{attack} one",
                f"two {attack}",
            )
            for attack in ATTACKS
        ]
    )
    ada = page("<b>ada</b>")
    before = ada.driver.execute_script("return document.querySelectorAll('*').length")
    for attack in ATTACKS:
        assert set(ada.sides()) == {f"{attack} one", f"two {attack}"}
        assert ada.text("prompt") == (attack * 2 if form == "chat" else attack)
        assert ada.driver.execute_script("return document.querySelectorAll('*').length") == before
        assert "hacked" not in ada.driver.title
        ada.press("t")
    assert ada.text("rater") == "<b>ada</b>"
    assert "hacked" not in ada.driver.title
    assert [entry for entry in ada.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_script_that_did_get_in_would_be_stopped_by_the_policy(store, page):
    ada = page("ada")
    ran = ada.driver.execute_script(
        """
        const image = document.createElement("img");
        const refused = [];
        try { image.innerHTML = "<b>x</b>"; } catch (e) { refused.push(e.name); }
        try { document.createElement("script").text = "document.title = 'hacked'"; }
        catch (e) { refused.push(e.name); }
        return refused;
        """
    )
    assert ran == ["TypeError", "TypeError"]
    assert "hacked" not in ada.driver.title


def test_sides_are_blind_and_vary(store, page):
    queue(store, 12)
    ada = page("ada")
    lefts = []
    for item in store.items():
        lefts.append(ada.sides()[0] == item.first)
        assert lefts[-1] == first_is_left(item.key, "ada")
        html = ada.driver.page_source
        assert item.key not in html
        assert not {"first", "second"} & set(html.lower().replace('"', " ").split())
        ada.press(Keys.ARROW_LEFT)
    assert set(lefts) == {True, False}
    assert [r.choice for r in store.ratings()] == [
        Choice.FIRST if left else Choice.SECOND for left in lefts
    ]


def test_the_name_is_kept_and_new_pairs_come_by_themselves(store, page):
    ada = page("ada")
    assert (ada.shown("waiting"), ada.text("waiting-title")) == (True, "Nothing to rate yet")
    queue(store, 2)
    ada.until(lambda: ada.shown("pair"), "a new pair came")
    ada.ready().press("t")
    ada.driver.refresh()
    ada.ready()
    assert (ada.text("rater"), ada.text("prompt")) == ("ada", "prompt 2")
    ada.press("t")
    assert [(r.item, r.rater) for r in store.ratings()] == [(1, "ada"), (2, "ada")]
    assert ada.text("waiting-title") == "All done"


def test_two_people_at_once_see_different_pairs_and_each_others_progress(store, page):
    queue(store, 2)
    ada, ben = page("ada"), page("ben")
    assert (ada.text("prompt"), ben.text("prompt")) == ("prompt 1", "prompt 2")
    ada.press("t")
    assert ada.text("waiting-text").startswith("Other people hold the last pairs.")
    ben.until(lambda: ben.text("counts").endswith("1 / 2 done"), "ben sees that ada has answered")
    ben.press("t")
    assert sorted((r.item, r.rater) for r in store.ratings()) == [(1, "ada"), (2, "ben")]


def test_an_answer_that_could_not_be_stored_is_not_lost_from_the_page(store, page):
    queue(store, 2)
    ada = page("ada").press("4")
    stop(store)
    ada.press(Keys.ARROW_LEFT)
    assert ada.text("alert").startswith("Not saved: answer again. The server does not answer")
    assert (ada.text("prompt"), ada.pressed("left")) == ("prompt 1", ["4"])
    assert store.ratings() == []
    port = int(ada.url.split(":")[2].split("/")[0])
    serve(store, "127.0.0.1", port)
    ada.press(Keys.ARROW_LEFT)
    assert len(store.ratings()) == 1
    assert not ada.shown("alert")
    assert ada.text("prompt") == "prompt 2"


def test_a_double_press_answers_one_pair(store, page):
    queue(store, 3)
    ada = page("ada")
    ada.driver.execute_script(
        """
        for (let press = 0; press < 3; press++) {
          document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "t", bubbles: true }));
        }
        """
    )
    ada.until(lambda: ada.text("prompt") == "prompt 2", "the next pair is shown")
    ada.ready()
    assert [rating.item for rating in store.ratings()] == [1]


def test_the_agreement_panel(store, page):
    queue(store, 3)
    for item, rater, choice, left in [
        (1, "ben", "first", True),
        (1, "eve", "tie", True),
        (2, "ben", "second", True),
        (2, "eve", "second", True),
    ]:
        store.rate(item, rater, Choice(choice), left=left, seconds=4.0)
    ada = page("ada")
    ada.driver.find_element(By.ID, "to-agreement").click()
    ada.until(lambda: ada.text("raters"), "the table is filled")
    # Values f t, s s: 1 - 3·2 / (2·(1·1 + 1·2 + 1·2)) = 0.4.
    assert ada.text("tiles").startswith("α of preferences0.40α of qualities–ratings4pairs rated2")
    rows = ada.driver.find_elements(By.CSS_SELECTOR, "#raters tr")
    assert [[cell.text for cell in row.find_elements(By.XPATH, "*")] for row in rows] == [
        ["ben", "2", "0", "50 %", "0 %", "50 % of 2", "4.0 s"],
        ["eve", "2", "0", "0 %", "50 %", "50 % of 2", "4.0 s"],
    ]
    assert not ada.shown("actions")
    ada.press("t")
    assert len(store.ratings()) == 4, "keys do not answer what is not seen"
    ada.driver.find_element(By.LINK_TEXT, "Back to the pairs").click()
    ada.until(lambda: ada.shown("pair"), "the pair is back")
    assert ada.ready().text("prompt") == "prompt 3"


@pytest.mark.parametrize(("width", "side_by_side"), [(1280, True), (375, False)])
def test_it_fits_a_laptop_and_a_phone(store, page, width, side_by_side):
    store.queue([("p" * 300, "word " * 400, "x" * 2000)])
    ada = page("ada")
    ada.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": not side_by_side},
    )
    ada.until(
        lambda: ada.driver.execute_script("return [innerWidth, innerHeight]") == [width, 700],
        "the window has its size",
    )
    inner, outer = ada.driver.execute_script(
        "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
    )
    assert inner == outer, "nothing sticks out to the right"
    left, right = (
        ada.driver.find_element(By.ID, f"{side}-side").rect for side in ("left", "right")
    )
    assert (left["y"] == right["y"]) is side_by_side
    bottom = "return document.getElementById('actions').getBoundingClientRect().bottom"
    ada.until(lambda: ada.driver.execute_script(bottom) == 700, "the buttons are in sight")
