"""The page: what is on it, and what happens when somebody uploads something or moves a slider."""

import os
import re
import shutil
import socket
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4
from zipfile import ZipFile

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from backbones.errors import ConfigError, InputError
from backbones.inference import Inferencer
from backbones.inference.output_paths import without_suffix

from .upload import Drawn, Predicted, Upload

# Seconds between two searches for old files, and the age from which on files are deleted.
DELETE_CACHE = (600, 3600)
# The system's own: others may come from another host.
FONTS = dict(font='system-ui, sans-serif', font_mono='ui-monospace, monospace')
# The size that a camera is asked for: a model must keep up with its frames.
CAMERA = dict(width=dict(ideal=1280), height=dict(ideal=720))
# A browser loads nothing for this page that comes from another host.
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"
# Paths for which Gradio would fetch something from another host.
FOREIGN = re.compile(r'/(file[=/][a-z]{2,}:/|proxy=)', re.IGNORECASE)
CSS = """
.gradio-container { max-width: 2000px !important; }
h2 { margin: 0 !important; overflow-wrap: anywhere; }
.html-container { padding: 0 !important; }
.note { opacity: .7; }
.problem { color: var(--error-text-color); background: var(--error-background-fill);
           border: 1px solid var(--error-border-color); border-radius: var(--radius-md);
           padding: var(--spacing-md) var(--spacing-lg); overflow-wrap: anywhere; }
.table-wrap * { font-family: var(--font) !important; }
/* Trimming would need a program from another host. */
button[aria-label^='Trim'], button[aria-label^='Reset video'] { display: none !important; }
"""


class Panel(NamedTuple):
    """The components that show the results of a model."""

    image: gr.Image
    video: gr.Video
    note: gr.HTML
    table: gr.Dataframe


class Page:
    """A page to try models on; :attr:`blocks` is its Gradio app.

    Models are shown under their names, and the score threshold starts at ``score_thr``. Uploads
    are limited to ``megapixels`` and ``seconds``. Everything in ``folder``, which holds uploads
    and results, can be read through the page.
    """

    def __init__(
        self,
        models: dict[str, Inferencer],
        megapixels: float,
        seconds: float,
        score_thr: float,
        folder: Path,
    ) -> None:
        self.models, self.folder = models, folder
        self.megapixels, self.seconds = megapixels, seconds
        # The upload that a tab shows, by Gradio's session hash.
        self.uploads: dict[str, Upload] = {}
        detects = any(model.task == 'detection' for model in models.values())
        names = dict.fromkeys(name for model in models.values() for name in model.classes)
        camera = gr.WebcamOptions(mirror=False, constraints={'video': CAMERA})
        self.blocks = gr.Blocks(
            title=' · '.join(models),
            analytics_enabled=False,
            delete_cache=DELETE_CACHE,
            fill_width=True,
        )
        with self.blocks, gr.Row():
            with gr.Column(scale=1, min_width=300):
                with gr.Tab('Image'):
                    image = as_file(gr.Image(show_label=False, webcam_options=camera, height=260))
                with gr.Tab('Video'):
                    video = as_file(gr.Video(show_label=False, webcam_options=camera, height=260))
                    stop = gr.Button('Stop here', size='sm')
                settings = [
                    gr.Slider(0, 1, score_thr, step=0.01, label='Score threshold', visible=detects),
                    gr.Dropdown(
                        list(names),
                        label='Classes',
                        info='if none is chosen, all are shown',
                        multiselect=True,
                    ),
                    gr.Slider(0, 1, 0.5, step=0.05, label='Opacity of masks and regions'),
                ]
                self.download = gr.DownloadButton('Download results', interactive=False)
            with gr.Column(scale=2 if len(models) == 1 else 3, min_width=300):
                self.status = gr.HTML(padding=False)
                with gr.Row():
                    self.panels = {name: add_panel(name, model) for name, model in models.items()}
            # Changes when the models have run on an upload.
            self.shown = gr.State()
            outputs = [self.status, self.download, *(c for p in self.panels.values() for c in p)]
            private = dict(api_visibility='private')
            # The models run on one upload at a time. Drawing does not wait for them; drawings of a
            # tab wait for one another, and the last has the newest settings.
            for source in (image, video):
                source.change(self.change, source, queue=False, **private)
                source.change(
                    self.show, source, [*outputs, self.shown], concurrency_id='models', **private
                )
            gr.on(
                [self.shown.change, *(setting.change for setting in settings)],
                self.draw,
                settings,
                outputs,
                show_progress='minimal',
                trigger_mode='always_last',
                concurrency_limit=None,
                **private,
            )
            stop.click(self.stop, queue=False, **private)
            self.blocks.unload(self.leave)

    def serve(self, host: str, port: int | None, max_megabytes: int) -> str:
        """Start the server, by default at the first free port from 7860 on; return its URL."""
        host = host.strip('[]')
        is_ipv6 = ':' in host
        # Gradio requests its own page, which must not go through a proxy.
        others = os.environ.get('no_proxy') or os.environ.get('NO_PROXY')
        os.environ['no_proxy'] = ','.join(filter(None, [others, 'localhost', host]))
        try:
            # For another machine's address, Gradio would try a hundred ports, 5 s each.
            family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
            socket.create_server((host, port or 0), family=family).close()
            _, url, _ = self.blocks.launch(
                server_name=f'[{host}]' if is_ipv6 else host,
                server_port=port,
                max_file_size=max_megabytes * 2**20,
                theme=gr.themes.Default(**FONTS),
                css=CSS,
                app_kwargs=dict(middleware=[Middleware(Guard)]),
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
            )
        except (OSError, OverflowError) as error:
            raise ConfigError(f'{host}, port {port or "7860 and later"}: {error}') from error
        return url

    def show(
        self,
        path: str | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008
    ) -> dict:
        """Run the models on a new upload; :meth:`draw` then draws the predictions."""
        if path is None:
            return {self.status: gr.skip()}
        self.leave(request)
        folder = self.folder / uuid4().hex
        try:
            upload = Upload(self._copy(path, folder), self.megapixels, self.seconds)
            upload.source = path
            self.uploads[request.session_hash] = upload
            for name, model in self.models.items():
                if not upload.is_replaced:
                    upload.predicted[name] = upload.predict(model, f'{name} predicts')
        except InputError as error:
            self.leave(request)
            shutil.rmtree(folder, ignore_errors=True)
            return self._say(f'{Path(path).name} {error}')
        return {self.shown: folder.name}

    def draw(
        self,
        score_thr: float,
        classes: list[str],
        opacity: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008
    ) -> dict:
        """Draw the predictions, without running a model."""
        upload = self.uploads.get(request.session_hash)
        if upload is None or len(upload.predicted) < len(self.models):
            return {self.status: gr.skip()}
        folder = upload.path.parent / uuid4().hex
        try:
            updates = self._write(upload, folder, score_thr, classes or (), opacity)
        except InputError as error:
            updates = self._say(f'{upload.path.name} {error}')
        except OSError as error:
            updates = self._say(f'{upload.path.name}: results cannot be written: {error.strerror}')
        # Another upload may have removed this one and its files meanwhile.
        if self.uploads.get(request.session_hash) is not upload:
            return {self.status: gr.skip()}
        for old in upload.path.parent.iterdir():
            if old not in (folder, upload.path):
                shutil.rmtree(old, ignore_errors=True)
        return updates

    def _write(self, upload: Upload, folder: Path, *settings: Any) -> dict:
        """Write drawings, data and a ZIP of both by :meth:`draw`'s settings; return updates."""
        name, updates = upload.path.name, {}
        for model, predicted in upload.predicted.items():
            results = folder / 'results' / model
            drawn = upload.draw(self.models[model], predicted, results, *settings)
            updates |= filled(self.panels[model], drawn, predicted)
        archive = folder / f'{without_suffix(name)}.zip'
        write_archive(archive, folder / 'results')
        problems = [upload.problem, *(each.problem for each in upload.predicted.values())]
        said = '; '.join(dict.fromkeys(filter(None, problems)))
        return {
            self.status: problem(said and f'{name} {said}'),
            self.download: gr.DownloadButton(value=archive, interactive=True),
            **updates,
        }

    def change(self, path: str | None, request: gr.Request) -> None:
        """Stop the video that the models run on in this tab if ``path`` is another upload."""
        upload = self.uploads.get(request.session_hash)
        if upload and path and upload.source != path:
            upload.is_replaced = True
            upload.stopping.set()

    def stop(self, request: gr.Request) -> None:
        """Stop the video that the models run on in this tab; the finished part is shown."""
        if upload := self.uploads.get(request.session_hash):
            upload.stopping.set()

    def leave(self, request: gr.Request) -> None:
        """Delete a tab's upload and results: it was closed, or shows something else."""
        if upload := self.uploads.pop(request.session_hash, None):
            upload.stopping.set()
            shutil.rmtree(upload.path.parent, ignore_errors=True)

    def _copy(self, path: str, folder: Path) -> Path:
        """Copy an upload, so that it exists for as long as the page shows it."""
        if not Path(path).resolve().is_relative_to(self.folder.resolve()):
            raise InputError('is not an upload')
        folder.mkdir()
        return Path(shutil.copy(path, folder))

    def _say(self, text: str) -> dict:
        """Return updates that clear all results and show why there are none."""
        updates = {
            component: type(component)(value=None, visible=isinstance(component, gr.Image))
            for panel in self.panels.values()
            for component in panel
        }
        button = gr.DownloadButton(value=None, interactive=False)
        return {self.status: problem(text), self.download: button, **updates}


def add_panel(name: str, model: Inferencer) -> Panel:
    with gr.Column(min_width=300):
        about = f'<div class="note">{model.task} · {len(model.classes)} classes</div>'
        gr.HTML(f'<h2>{escape(name)}</h2>{about}', padding=False)
        return Panel(
            gr.Image(show_label=False, interactive=False, buttons=['download', 'fullscreen']),
            gr.Video(
                show_label=False,
                interactive=False,
                visible=False,
                autoplay=True,
                loop=True,
                buttons=['download'],
            ),
            gr.HTML(padding=False),
            gr.Dataframe(interactive=False, visible=False, max_height=360, buttons=[]),
        )


def as_file(source: gr.Image | gr.Video) -> gr.Image | gr.Video:
    """Make a source return the path of an upload, which is checked before it is decoded.

    This changes the instance: for a subclass, Gradio would write a file beside its module.
    """
    move = source.async_move_resource_to_block_cache

    async def refuse_url(path: str | None) -> str | None:
        if path and '://' in path:
            raise gr.Error('only uploads are accepted', print_exception=False)
        return await move(path)

    source.preprocess = lambda payload: payload and payload.path
    source.async_move_resource_to_block_cache = refuse_url
    return source


def problem(text: str) -> str:
    return f'<div class="problem">{escape(text)}</div>' if text else ''


def filled(panel: Panel, drawn: Drawn, predicted: Predicted) -> dict:
    """Return updates that show the results of a model."""
    is_video = drawn.path.suffix == '.mp4'
    frames, (read, model) = len(predicted.frames), predicted.seconds
    if is_video:
        note = (
            f'{frames} frames · reading and model {frames / model:.1f} frames/s · drawing '
            f'{frames / drawn.seconds:.1f} frames/s'
        )
    else:
        note = f'read {ms(read)} · model {ms(model)} · draw {ms(drawn.seconds)}'
    if not drawn.rows:
        note += '<br>nothing found with these settings'
    return {
        panel.image: gr.Image(None if is_video else drawn.path, visible=not is_video),
        panel.video: gr.Video(drawn.path if is_video else None, visible=is_video),
        panel.note: gr.HTML(f'<div class="note">{note}</div>'),
        panel.table: gr.Dataframe(drawn.rows, headers=drawn.header, visible=bool(drawn.rows)),
    }


def ms(seconds: float) -> str:
    return f'{1000 * seconds:.0f} ms'


def write_archive(path: Path, folder: Path) -> None:
    """Write a ZIP of all files in a folder."""
    with ZipFile(path, 'w') as archive:
        for file in sorted(filter(Path.is_file, folder.rglob('*'))):
            archive.write(file, file.relative_to(folder))


class Guard:
    """An ASGI app around Gradio's that keeps server and browser from contacting other hosts."""

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict) -> None:
            if message['type'] == 'http.response.start':
                message['headers'] = [*message['headers'], (b'content-security-policy', POLICY)]
            await send(message)

        app = self.app
        if scope['type'] == 'http' and FOREIGN.search(scope['path']):
            app = PlainTextResponse('only uploads and results can be read', 403)
        await app(scope, receive, send_with_policy)
