"""How the page is started."""

import subprocess
import sys

CODE = """
import gc, inspect, sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
from sdlora_ui import server
before = inspect.getfile
with server.quickly():
    import gradio
assert inspect.getfile is before and gc.isenabled()
assert gradio.Textbox("a").value == "a" and callable(gradio.Textbox.change)
assert any(path.endswith(".py") or path.endswith(".pyc") for path in opened), "the hook sees files"
print([path for path in opened if path.endswith(".pyi")])
"""


def test_gradio_is_imported_without_its_files_of_type_hints() -> None:
    told = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert told.stdout == "[]\n", told.stderr


def test_what_no_component_of_ours_needs_is_loaded_when_it_is_looked_into() -> None:
    code = (
        "import sys\nfrom sdlora_ui import server\nwith server.quickly():\n    import gradio\n"
        "assert 'pandas.core' not in sys.modules and server.Later not in sys.meta_path\n"
        "import pandas\nassert pandas.DataFrame({'a': [1]}).a[0] == 1\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr
