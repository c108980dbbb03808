"""The page at /: what this server is, a request to copy, and links. It has no script, and loads nothing."""

import json
from html import escape
from string import Template


PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>SQ-LLaVA server</title>
<style>
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; padding: 1rem; border: 1px solid; border-radius: 0.5rem; }
</style>
<h1>SQ-LLaVA server</h1>
<p>$model It answers questions about images through OpenAI's API, at <code>${url}v1</code>.</p>
<p>To ask about <code>photo.jpg</code>:</p>
<pre tabindex="0">$command</pre>
<p>To let the model ask, add <code>"self_question": true</code>.</p>
<ul>$links</ul>
</html>
""")
COMMAND = Template("""echo '{"model": "$model", "max_tokens": 100, "messages": [{"role": "user", "content": [
  {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,'"$$(base64 < photo.jpg)"'"}},
  {"type": "text", "text": "What is in the picture?"}]}]}' | tr -d '\\n' |
  curl ${url}v1/chat/completions --json @-$key""")


def page(model_name: str | None, url: str, paths: list[str]) -> str:
    """
    Returns the page as HTML.

    Args:
        model_name (`str`, *optional*): Name of the model. If clients need a key, it is not shown.
        url (`str`): Address of the server, with a slash at the end.
        paths (`list[str]`): Paths to link to.
    """
    key = "" if model_name is not None else ' -H "Authorization: Bearer $KEY"'
    in_quotes = json.dumps(model_name or "MODEL")[1:-1].replace("'", "'\\''")
    command = COMMAND.substitute(model=in_quotes, url=url, key=key)
    shown = "Clients need a key." if model_name is None else f"The model is <code>{escape(model_name)}</code>."
    links = "".join(f'<li><a href="{path}">{path}</a></li>' for path in paths)
    return PAGE.substitute(model=shown, url=escape(url), command=escape(command), links=links)
