"""server.transport.rpc.session: what is counted of requests that share a stream."""

from __future__ import annotations

import time

from server._pb import inference_pb2 as pb
from server.errors import TooManyRequests
from server.transport.rpc.session import StreamSession
from tests.unit.test_gateway import Rig, run

HOUR_NS = 3_600 * 10**9


def test_a_request_on_an_old_stream_is_not_as_old_as_the_stream() -> None:
    async def body() -> None:
        rig = Rig()
        permit = rig.admit(protocol="grpc", received_ns=time.monotonic_ns() - HOUR_NS)
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])
        message = pb.ModelInferRequest(model_name="m", inputs=[tensor], raw_input_contents=[bytes(16)])
        left, written = [message.SerializeToString()] * 3, list[bytes]()

        async def read() -> bytes | None:
            return left.pop() if left else None

        async def write(answer: bytes) -> None:
            written.append(answer)

        await StreamSession(rig.gateway, permit, read, write, max_in_flight=2).run()
        permit.release()
        stats = rig.telemetry.stats_for("m", "1")
        assert (len(written), stats.success_count) == (3, 3)
        assert stats.success_ns < HOUR_NS
        await rig.close()

    run(body)


def test_an_answer_that_finds_no_room_is_counted_as_the_error_that_its_caller_is_told() -> None:
    async def body() -> None:
        rig = Rig()
        permit = rig.admit(protocol="grpc")
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])
        message = pb.ModelInferRequest(model_name="m", inputs=[tensor], raw_input_contents=[bytes(16)])
        raw = message.SerializeToString()
        left, written = [raw], list[bytes]()

        async def read() -> bytes | None:
            return left.pop() if left else None

        async def write(answer: bytes) -> None:
            written.append(answer)

        def hold(size: int) -> None:
            if size > len(raw):
                raise TooManyRequests("no room")

        await StreamSession(rig.gateway, permit, read, write, max_in_flight=2, hold=hold).run()
        permit.release()
        stats = rig.telemetry.stats_for("m", "1")
        assert [pb.ModelStreamInferResponse.FromString(one).error_message for one in written] == ["no room"]
        assert (stats.success_count, stats.fail_count) == (0, 1)
        await rig.close()

    run(body)
