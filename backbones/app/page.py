"""The page: what is on it, and what happens when somebody uploads something or moves a slider."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4
from zipfile import ZipFile

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from backbones.errors import ConfigError, InputError
from backbones.inference import Inferencer
from backbones.inference.output_paths import without_suffix

from .upload import Drawn, Limits, Predicted, Report, Settings, Upload

# Seconds between two looks for files that nobody needs any more, and from what age on.
DELETE_CACHE = (600, 3600)
# Of the system: others may come from another host.
FONTS = dict(font='system-ui, sans-serif', font_mono='ui-monospace, monospace')
# What a camera is asked for: a model has to keep up with what it records.
CAMERA = dict(width=dict(ideal=1280), height=dict(ideal=720))
# What a browser may load for this page, and from where: only from here.
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"
# Paths with which Gradio would fetch something from another host.
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
    """Where the results of a model are shown."""

    image: gr.Image
    video: gr.Video
    note: gr.HTML
    table: gr.Dataframe


@dataclass
class Visit:
    """An open tab: the upload that it shows, what the models predict for it, and its files."""

    source: str
    # Where it was uploaded.
    component: gr.components.Component
    folder: Path
    upload: Upload
    predicted: dict[str, Predicted] = field(default_factory=dict)
    # Where the drawings that were begun last lie; None when the visit is over.
    newest: Path | None = None


class Page:
    """A page to try models on.

    Args:
        models: By the names that they are shown under.
        limits: Of uploads.
        score_thr: The threshold to begin with.
        folder: For uploads and results. What is in it can be read through the page.

    Attributes:
        blocks: What to launch.
    """

    def __init__(
        self, models: dict[str, Inferencer], limits: Limits, score_thr: float, folder: Path
    ) -> None:
        self.models, self.limits, self.folder = models, limits, folder
        # By Gradio's name for an open tab, the second since a setting was changed in it.
        self.visits: dict[str, Visit] = {}
        self.settings: dict[str, Settings] = {}
        self.blocks = gr.Blocks(
            title=' · '.join(models),
            analytics_enabled=False,
            delete_cache=DELETE_CACHE,
            fill_width=True,
        )
        with self.blocks, gr.Row():
            with gr.Column(scale=1, min_width=300):
                sources, stop = self._add_sources()
                settings = self._add_settings(score_thr)
                self.download = gr.DownloadButton('Download results', interactive=False)
            with gr.Column(scale=2 if len(models) == 1 else 3, min_width=300):
                self.status = gr.HTML(padding=False)
                with gr.Row():
                    self.panels = {name: self._add_panel(name) for name in models}
        self._connect(sources, settings, stop)

    def serve(self, host: str, port: int | None, max_megabytes: int) -> str:
        """Begin to answer browsers, and return the page's URL.

        By default the port is 7860, or the next one that is free.

        Raises:
            ConfigError: The port is taken, or there is no such address here.
        """
        try:
            _, url, _ = self.blocks.launch(
                server_name=host,
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
        except OSError as error:
            raise ConfigError(f'{host}, port {port or "7860 and later"}: {error}') from error
        return url

    def _add_sources(self) -> tuple[list[gr.components.Component], gr.Button]:
        camera = gr.WebcamOptions(mirror=False, constraints={'video': CAMERA})
        with gr.Tab('Image'):
            image = as_file(gr.Image(show_label=False, webcam_options=camera, height=260))
        with gr.Tab('Video'):
            video = as_file(gr.Video(show_label=False, webcam_options=camera, height=260))
            stop = gr.Button('Stop here', size='sm')
        return [image, video], stop

    def _add_settings(self, score_thr: float) -> list[gr.components.Component]:
        models = self.models.values()
        detects = any(model.task == 'detection' for model in models)
        names = dict.fromkeys(name for model in models for name in model.classes)
        return [
            gr.Slider(0, 1, score_thr, step=0.01, label='Score threshold', visible=detects),
            gr.Dropdown(
                list(names), label='Classes', info='none chosen: all of them', multiselect=True
            ),
            gr.Slider(0, 1, 0.5, step=0.05, label='Opacity of masks and regions'),
        ]

    def _add_panel(self, name: str) -> Panel:
        model = self.models[name]
        with gr.Column(min_width=300):
            gr.HTML(
                f'<h2>{escape(name)}</h2><div class="note">{model.task} · '
                f'{len(model.classes)} classes</div>',
                padding=False,
            )
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

    def _connect(
        self,
        sources: list[gr.components.Component],
        settings: list[gr.components.Component],
        stop: gr.Button,
    ) -> None:
        """Say what happens when; models take turns, drawing waits for nobody."""
        outputs = [self.status, self.download, *(c for p in self.panels.values() for c in p)]
        private = dict(api_visibility='private')
        with self.blocks:
            for source in sources:
                source.change(self.change, source, queue=False, **private)
                source.change(
                    self.show, [source, *settings], outputs, concurrency_id='models', **private
                )
            gr.on(
                [setting.change for setting in settings],
                self.redraw,
                settings,
                outputs,
                show_progress='minimal',
                trigger_mode='always_last',
                concurrency_limit=None,
                **private,
            )
            stop.click(self.stop, queue=False, **private)
            self.blocks.unload(self.leave)

    def show(
        self,
        path: str | None,
        score_thr: float,
        classes: list[str],
        opacity: float,
        request: gr.Request,
        event: gr.EventData,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict:
        """Run the models on a new upload, and draw what they predict."""
        if self._is_other(path, request, event):
            return {self.status: gr.skip()}
        self._forget(request)
        if path is None:
            return self._say('')
        folder = self.folder / uuid4().hex
        try:
            visit = Visit(path, event.target, folder, Upload(self._copy(path, folder), self.limits))
            self.visits[request.session_hash] = visit
            for name, model in self.models.items():
                report = reporter(progress, f'{name} predicts')
                visit.predicted[name] = visit.upload.predict(model, report)
        except InputError as error:
            self._forget(request)
            shutil.rmtree(folder, ignore_errors=True)
            return self._say(str(error))
        return self._draw(Settings(score_thr, tuple(classes or ()), opacity), request, progress)

    def redraw(
        self,
        score_thr: float,
        classes: list[str],
        opacity: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict:
        """Draw the predictions, without running a model."""
        settings = Settings(score_thr, tuple(classes or ()), opacity)
        # Of an upload that a model is running on, too: it is drawn with the newest settings.
        self.settings[request.session_hash] = settings
        return self._draw(settings, request, progress)

    def _draw(self, settings: Settings, request: gr.Request, progress: gr.Progress) -> dict:
        """Draw with the tab's newest settings; ``settings`` where none were changed in it."""
        visit = self.visits.get(request.session_hash)
        if visit is None or len(visit.predicted) < len(self.models):
            return {self.status: gr.skip()}
        folder = visit.newest = visit.folder / uuid4().hex
        settings = self.settings.get(request.session_hash, settings)
        try:
            updates = self._write(visit, folder, settings, progress)
        except InputError as error:
            updates = self._say(str(error))
        except OSError as error:
            text = f'{visit.upload.path.name}: results cannot be written: {error.strerror}'
            updates = self._say(text)
        # A later drawing, which removes this one's files, is what the page shows.
        if visit.newest != folder:
            shutil.rmtree(folder, ignore_errors=True)
            return {self.status: gr.skip()}
        for old in visit.folder.iterdir():
            if old not in (folder, visit.upload.path):
                shutil.rmtree(old, ignore_errors=True)
        return updates

    def _write(self, visit: Visit, folder: Path, settings: Settings, progress: gr.Progress) -> dict:
        """Write drawings, data and an archive of them; updates that show them."""
        name, updates = visit.upload.path.name, {}
        for model, predicted in visit.predicted.items():
            report = reporter(progress, f'{model} is drawn')
            drawn = visit.upload.draw(
                self.models[model], predicted, settings, folder / 'results' / model, report
            )
            updates |= filled(self.panels[model], drawn, predicted)
        archive = folder / f'{without_suffix(name)}.zip'
        write_archive(archive, folder / 'results')
        problems = [visit.upload.problem, *(each.problem for each in visit.predicted.values())]
        said = '; '.join(dict.fromkeys(filter(None, problems)))
        return {
            self.status: problem(said and f'{name} {said}'),
            self.download: gr.DownloadButton(value=archive, interactive=True),
            **updates,
        }

    def change(self, path: str | None, request: gr.Request, event: gr.EventData) -> None:
        """End the video that runs here for another upload, or where it is removed."""
        visit = self.visits.get(request.session_hash)
        if visit and visit.source != path and not self._is_other(path, request, event):
            self.stop(request)

    def stop(self, request: gr.Request) -> None:
        """End the video that runs here; what is done is shown."""
        if visit := self.visits.get(request.session_hash):
            visit.upload.stopping.set()

    def leave(self, request: gr.Request) -> None:
        """Forget a tab that was closed."""
        self._forget(request)
        self.settings.pop(request.session_hash, None)

    def _forget(self, request: gr.Request) -> None:
        """Forget what a tab has shown."""
        if visit := self.visits.pop(request.session_hash, None):
            visit.newest = None
            visit.upload.stopping.set()
            shutil.rmtree(visit.folder, ignore_errors=True)

    def _is_other(self, path: str | None, request: gr.Request, event: gr.EventData) -> bool:
        """Whether an upload was removed that is not the one whose results are shown."""
        visit = self.visits.get(request.session_hash)
        return path is None and visit is not None and visit.component is not event.target

    def _copy(self, path: str, folder: Path) -> Path:
        """A copy of an upload, which stays for as long as the page shows it."""
        if not Path(path).resolve().is_relative_to(self.folder.resolve()):
            raise InputError('only uploads are taken')
        folder.mkdir()
        return Path(shutil.copy(path, folder))

    def _say(self, text: str) -> dict:
        """Updates for a page without results: why there are none."""
        updates = {
            component: type(component)(value=None, visible=isinstance(component, gr.Image))
            for panel in self.panels.values()
            for component in panel
        }
        button = gr.DownloadButton(value=None, interactive=False)
        return {self.status: problem(text), self.download: button, **updates}


def as_file(source: gr.Image | gr.Video) -> gr.Image | gr.Video:
    """Make a source give the path of what is uploaded: not decoded before it is checked.

    On the instance, as Gradio writes a file beside every module with a subclass.
    """
    move = source.async_move_resource_to_block_cache

    async def refuse_url(path: str | None) -> str | None:
        if path and '://' in path:
            raise gr.Error('only uploads are taken', print_exception=False)
        return await move(path)

    source.preprocess = lambda payload: payload and payload.path
    source.async_move_resource_to_block_cache = refuse_url
    return source


def problem(text: str) -> str:
    return f'<div class="problem">{escape(text)}</div>' if text else ''


def reporter(progress: gr.Progress, what: str) -> Report:
    """Shows on the page how far it is."""
    return lambda done, total: progress((done, total), desc=what, unit='frames')


def filled(panel: Panel, drawn: Drawn, predicted: Predicted) -> dict:
    """Updates for the results of a model."""
    is_video = drawn.path.suffix == '.mp4'
    frames, (read, model) = len(predicted.frames), predicted.seconds
    if is_video:
        note = (
            f'{frames} frames · model {frames / model:.1f} a second, with reading · drawing '
            f'{frames / drawn.seconds:.1f} a second'
        )
    else:
        note = f'read {ms(read)} · model {ms(model)} · draw {ms(drawn.seconds)}'
    if not drawn.rows:
        note += '<br>nothing found at these settings'
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
    """An ASGI app around Gradio's, which keeps server and browser from asking another host."""

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
