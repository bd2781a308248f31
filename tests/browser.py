"""JupyterLab in a real Chromium, for tests that drive a page with the mouse. Pictures of the page are kept in
runs/browser/.

KIT_BROWSER_PATIENCE: seconds to wait for one thing (default 240; two busy cores are slow). KIT_BROWSER_SKIP=1: skip
these tests."""
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT/"runs/browser"
PATIENCE = float(os.environ.get("KIT_BROWSER_PATIENCE", 240))
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
SETTINGS = {"apputils-extension/notification": dict(checkForUpdates=False, fetchNews="false", doNotDisturbMode=True),
            # every cell is on the page, so that its pictures can be looked at
            "notebook-extension/tracker": dict(windowingMode="none")}

def missing():
    "Why there can be no browser test here, or None."
    if os.environ.get("KIT_BROWSER_SKIP") == "1": return "KIT_BROWSER_SKIP=1"
    if not shutil.which("chromium"): return "no chromium: apt-get install -y --no-install-recommends chromium"
    for name, what in (("playwright", "pip install -e '.[browser]'"), ("jupyterlab", "pip install -e '.[dev]'")):
        if importlib.util.find_spec(name) is None: return f"no {name}: {what}"

def until(ready, what, patience=None):
    "Wait until ready() is true and return what it says; the test fails with `what` otherwise."
    end = time.monotonic() + (patience or PATIENCE)
    while not (found := ready()):
        if time.monotonic() > end: pytest.fail(f"waited {patience or PATIENCE:.0f} s for {what}")
        time.sleep(0.2)
    return found

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server: return server.getsockname()[1]

def answers(url):
    "Somebody is there, whatever he says."
    try: return bool(urllib.request.urlopen(url, timeout=5))
    except urllib.error.HTTPError: return True
    except OSError: return False

@contextlib.contextmanager
def server(command, url, env, log):
    "A server in a process of its own, once it answers at `url`; its log is shown when it does not."
    with open(log, "wb") as out: process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        until(lambda: process.poll() is not None or answers(url), f"{command[2]} to start")
        if process.poll() is not None: pytest.fail(f"{command[2]} ended:\n{Path(log).read_text()[-2000:]}")
        yield
    finally:
        process.terminate()
        try: process.wait(30)
        except subprocess.TimeoutExpired: process.kill()

@contextlib.contextmanager
def jupyter_lab(folder, home):
    """A JupyterLab that sees `folder` and keeps all of its own files in `home`; gives a function from a notebook's
    name to its address."""
    for name, values in SETTINGS.items():
        path = home/f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    own = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="runtime",
               IPYTHONDIR="ipython",
               JUPYTERLAB_SETTINGS_DIR="settings", JUPYTERLAB_WORKSPACES_DIR="workspaces")
    token, root = secrets.token_hex(8), hasattr(os, "getuid") and os.getuid() == 0
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0",
               f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}",
               "--LabApp.expose_app_in_browser=True",
               *(["--allow-root"] if root else [])]
    env = {**os.environ, **{name: str(home/sub) for name, sub in own.items()}}
    with server(command, f"{url}/api/status?token={token}", env, home/"lab.log"):
        yield lambda name: f"{url}/lab/tree/{name}?reset&token={token}"

@contextlib.contextmanager
def voila(folder, name, home):
    "One notebook as a web page without code; gives its address."
    url = f"http://127.0.0.1:{(port := free_port())}/"
    env = {**os.environ, "JUPYTER_RUNTIME_DIR": str(home/"runtime"), "IPYTHONDIR": str(home/"ipython")}
    command = [sys.executable, "-m", "voila", str(folder/name), "--no-browser", f"--port={port}",
               "--Voila.ip=127.0.0.1"]
    with server(command, f"{url}api/status", env, home/"voila.log"): yield url

@contextlib.contextmanager
def chromium(width=1280, height=1100, **context):
    "A page of a headless Chromium that reaches this machine only; `page.refused` lists what it asked elsewhere."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS,
                                             timeout=1000*PATIENCE)
        try:
            page = browser.new_page(viewport=dict(width=width, height=height), **context)
            page.set_default_timeout(1000*PATIENCE)
            page.refused, page.problems = [], []
            def gate(route):
                if route.request.url.startswith(("http://127.0.0.1", "data:", "blob:")): return route.continue_()
                page.refused.append(route.request.url)
                route.abort()
            page.route(lambda url: not url.startswith("http://127.0.0.1"), gate)
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            yield page
        finally: browser.close()

@pytest.fixture(scope="module")
def page():
    "One browser for the tests of a file."
    if reason := missing(): pytest.skip(reason)
    with chromium() as page: yield page

def picture(shown, name):
    "Keep a picture of a page, or of one element of it."
    PICTURES.mkdir(parents=True, exist_ok=True)
    return shown.screenshot(path=PICTURES/f"{name}.png")

WIDER = """() => [...document.querySelectorAll('.jp-OutputArea-output, .jp-RenderedMarkdown')]
    .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 4 && getComputedStyle(e).overflowX === 'visible')
    .map(e => e.innerText.slice(0, 60) || e.firstElementChild?.tagName)"""
HEIGHT = """() => {
    const cells = [...document.querySelectorAll('.jp-Notebook .jp-Cell')].filter(e => e.offsetParent);
    return Math.ceil(cells.at(-1).getBoundingClientRect().bottom - cells[0].getBoundingClientRect().top);
}"""
TO_TOP = "() => document.querySelector('.jp-Notebook .jp-Cell').scrollIntoView()"
NO_SIDEBAR = "() => window.jupyterapp.shell.collapseLeft()"

def whole_page(page, width, name, tallest=16000):
    "Keep a picture of a whole notebook at a width; gives the outputs that stick out of it."
    usual = page.viewport_size
    page.evaluate(NO_SIDEBAR)
    page.set_viewport_size(dict(width=width, height=usual["height"]))
    time.sleep(1) # the page lays itself out anew
    page.set_viewport_size(dict(width=width, height=min(tallest, page.evaluate(HEIGHT) + 200)))
    time.sleep(1)
    page.evaluate(TO_TOP)
    picture(page, name)
    wider = page.evaluate(WIDER)
    page.set_viewport_size(usual)
    return wider

READY = """() => {
    const panel = window.jupyterapp?.shell.currentWidget, kernel = panel?.sessionContext?.session?.kernel;
    const connected = kernel?.connectionStatus === 'connected';
    return Boolean(panel?.content?.model && connected && ['idle', 'unknown'].includes(kernel.status));
}"""
RUN_ALL = """() => {
    window.kitRun = null;
    window.jupyterapp.commands.execute('notebook:run-all-cells').then(
        ok => window.kitRun = {ok}, error => window.kitRun = {error: String(error)});
}"""
ERRORS = """() => window.jupyterapp.shell.currentWidget.content.widgets
    .flatMap(cell => cell.model.outputs?.toJSON() ?? [])
    .filter(output => output.output_type === 'error').map(output => output.ename + ': ' + output.evalue)"""
WARNINGS = """() => window.jupyterapp.shell.currentWidget.content.widgets
    .flatMap(cell => cell.model.outputs?.toJSON() ?? [])
    .filter(output => output.name === 'stderr').map(output => [output.text].flat().join(''))
    .filter(text => text.includes('Warning'))"""

def open_notebook(page, url):
    "Open a notebook and wait for its kernel."
    page.goto(url, wait_until="domcontentloaded")
    until(lambda: page.evaluate(READY), "the notebook and its kernel")

def run_all(page, patience=None):
    "Run all cells; the test fails when one of them is red or warns."
    page.evaluate(RUN_ALL)
    until(lambda: page.evaluate("() => window.kitRun"), "Run All to end", patience)
    assert page.evaluate(ERRORS) == []
    assert page.evaluate(WARNINGS) == []
