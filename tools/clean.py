"Clean notebooks: nbdev_clean, and the widget state that it keeps. Takes the root of a checkout or of a copy of one."
import json
import sys
from pathlib import Path

VIEW = "application/vnd.jupyter.widget-view+json"


def notebooks(root):
    "All notebooks of nbs/ and tutorials/."
    found = [p for folder in ("nbs", "tutorials") for p in sorted((Path(root)/folder).rglob("*.ipynb"))]
    return [p for p in found if ".ipynb_checkpoints" not in p.parts]


def strip_widgets(path):
    """Remove metadata.widgets, which some viewers stumble over, and views of dead widgets: beside each stands what a
    page without Python can show."""
    nb = json.loads(path.read_text(encoding="utf-8"))
    shown = [o["data"] for c in nb["cells"] for o in c.get("outputs", []) if len(o.get("data", {})) > 1]
    removed = [nb["metadata"].pop("widgets", None), *(data.pop(VIEW, None) for data in shown)]
    if any(r is not None for r in removed):
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def clean(root):
    from nbdev.clean import nbdev_clean
    for path in notebooks(root):
        strip_widgets(path)
        nbdev_clean(str(path))


if __name__ == "__main__": clean(sys.argv[1] if len(sys.argv) > 1 else ".")
