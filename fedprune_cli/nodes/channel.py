"""How gRPC is set up on both sides: no generated code, one stream a node, TLS in both directions, and signs of life.

What comes from a stream is bytes of `protocol`; a stream that ends says why by one of the codes here. Needs the extra `nodes`.
"""

from __future__ import annotations

from fedprune_cli.errors import ConfigError

try:
    import grpc
except ImportError:
    raise ConfigError("nodes need the packages grpcio and cryptography: pip install 'fedprune[nodes]'") from None

__all__ = ["ATTEND", "METHOD", "REFUSALS", "SERVICE", "grpc", "options"]

SERVICE, ATTEND = "fedprune.Nodes", "Attend"
METHOD = f"/{SERVICE}/{ATTEND}"
# A peer that is silent for their sum is gone. A ping's answer waits behind what is being sent: a message that is longer on its way than
# PONG_MS breaks its link, each time anew.
PING_MS, PONG_MS = 5_000, 13_000
REFUSALS = (  # which no second try would change
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNIMPLEMENTED,
)


def options(most_bytes: int) -> list[tuple[str, int]]:
    """Returns the settings of a channel or a server that takes messages of at most so many bytes."""
    return [
        ("grpc.max_receive_message_length", most_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", PING_MS),
        ("grpc.keepalive_timeout_ms", PONG_MS),
        ("grpc.http2.ping_timeout_ms", PONG_MS),  # a minute otherwise, whatever the line above says
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.bdp_probe", 0),  # further pings, in the middle of every message
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_MS // 2),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
