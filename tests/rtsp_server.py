"""The smallest RTSP server: one client, one H.264 stream, inside the TCP connection."""

import socket
import threading
from fractions import Fraction

import av
import numpy as np

SDP = """\
v=0
o=- 0 0 IN IP4 127.0.0.1
s=test
c=IN IP4 127.0.0.1
t=0 0
m=video 0 RTP/AVP 96
a=rtpmap:96 H264/90000
a=fmtp:96 packetization-mode=1
a=control:video
""".replace('\n', '\r\n')


class RtspServer:
    """Plays gray images that become lighter, then falls silent or hangs up.

    Args:
        num_frames: How many images of 64x48 pixels it sends, 25 a second.
        hang_up: Whether it closes the connection after the last one.
    """

    def __init__(self, num_frames: int, hang_up: bool = True) -> None:
        self.num_frames = num_frames
        self.hang_up = hang_up
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.url = f'rtsp://127.0.0.1:{self.listener.getsockname()[1]}/test'
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> 'RtspServer':
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.listener.close()
        self.thread.join(5)

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection, connection.makefile('rb') as requests:
            method = ''
            while method != 'PLAY' and not self.stopped.is_set():
                method, headers = read_request(requests)
                reply = {'CSeq': headers['cseq'], 'Session': '1'}
                body = SDP if method == 'DESCRIBE' else ''
                if method == 'OPTIONS':
                    reply['Public'] = 'DESCRIBE, SETUP, PLAY, TEARDOWN'
                elif method == 'DESCRIBE':
                    reply['Content-Type'] = 'application/sdp'
                elif method == 'SETUP':
                    reply['Transport'] = 'RTP/AVP/TCP;unicast;interleaved=0-1'
                reply['Content-Length'] = str(len(body))
                lines = ['RTSP/1.0 200 OK', *(f'{key}: {value}' for key, value in reply.items())]
                connection.sendall(('\r\n'.join(lines) + '\r\n\r\n' + body).encode())
            self._play(connection)
            if not self.hang_up:
                self.stopped.wait()

    def _play(self, connection: socket.socket) -> None:
        """RTP between the replies: a dollar sign, the channel, the length, the packet."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay:
            relay.bind(('127.0.0.1', 0))
            relay.settimeout(0.05)
            player = threading.Thread(target=self._send, args=(relay.getsockname()[1],))
            player.start()
            try:
                while True:
                    # Asked before: what it has sent until now is received first.
                    has_ended = not player.is_alive()
                    try:
                        packet = relay.recv(2048)
                    except TimeoutError:
                        if has_ended:
                            return
                        continue
                    connection.sendall(b'$\0' + len(packet).to_bytes(2, 'big') + packet)
            except ConnectionError:
                self.stopped.set()
            finally:
                player.join()

    def _send(self, port: int) -> None:
        with av.open(f'rtp://127.0.0.1:{port}', 'w', format='rtp') as container:
            stream = container.add_stream('libx264', rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
            stream.options = {'preset': 'ultrafast', 'tune': 'zerolatency', 'g': '5'}
            for index in range(self.num_frames):
                if self.stopped.wait(0.04):
                    return
                image = np.full((48, 64, 3), min(255, 20 + 4 * index), np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format='bgr24')
                frame.pts, frame.time_base = index, Fraction(1, 25)
                container.mux(stream.encode(frame))


def read_request(requests) -> tuple[str, dict[str, str]]:
    """The method and the headers, in small letters, of one request."""
    method = requests.readline().decode().split(' ')[0]
    headers = {}
    while line := requests.readline().decode().strip():
        key, _, value = line.partition(':')
        headers[key.lower()] = value.strip()
    return method, headers
