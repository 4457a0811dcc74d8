"""The smallest RTSP server: one client, one H.264 stream, over UDP or inside the TCP connection."""

import re
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
    """Plays grey pictures that become lighter, as often as asked, then falls silent or hangs up.

    Args:
        transport: 'tcp' or 'udp': the only one it agrees to.
        num_frames: How many pictures of 64x48 pixels it sends, 25 a second.
        hang_up: Whether it closes the connection after the last one.
    """

    def __init__(self, transport: str, num_frames: int, hang_up: bool = True) -> None:
        self.transport = transport
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
        client_port = 0
        with connection, connection.makefile('rb') as requests:
            while not self.stopped.is_set():
                method, headers = read_request(requests)
                reply = {'CSeq': headers['cseq'], 'Session': '1'}
                status = '200 OK'
                body = ''
                if method == 'OPTIONS':
                    reply['Public'] = 'DESCRIBE, SETUP, PLAY, TEARDOWN'
                elif method == 'DESCRIBE':
                    reply['Content-Type'] = 'application/sdp'
                    body = SDP
                elif method == 'SETUP':
                    wanted = headers['transport']
                    if ('TCP' in wanted) != (self.transport == 'tcp'):
                        status = '461 Unsupported Transport'
                    elif self.transport == 'udp':
                        client_port = int(re.search(r'client_port=(\d+)', wanted)[1])
                        reply['Transport'] = f'{wanted};server_port=0-1'
                    else:
                        reply['Transport'] = 'RTP/AVP/TCP;unicast;interleaved=0-1'
                reply['Content-Length'] = str(len(body))
                lines = [f'RTSP/1.0 {status}', *(f'{key}: {value}' for key, value in reply.items())]
                connection.sendall(('\r\n'.join(lines) + '\r\n\r\n' + body).encode())
                if method == 'PLAY':
                    break
            if self.transport == 'udp':
                self._play(client_port)
            else:
                self._play_over(connection)
            if not self.hang_up:
                self.stopped.wait()

    def _play_over(self, connection: socket.socket) -> None:
        """RTP between the replies: a dollar sign, the channel, the length, the packet."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay:
            relay.bind(('127.0.0.1', 0))
            relay.settimeout(0.05)
            player = threading.Thread(target=self._play, args=(relay.getsockname()[1],))
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

    def _play(self, port: int) -> None:
        with av.open(f'rtp://127.0.0.1:{port}', 'w', format='rtp') as container:
            stream = container.add_stream('libx264', rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
            stream.options = {'preset': 'ultrafast', 'tune': 'zerolatency', 'g': '5'}
            for index in range(self.num_frames):
                if self.stopped.wait(0.04):
                    return
                level = min(255, 20 + 4 * index)
                picture = np.full((48, 64, 3), level, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format='bgr24')
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
