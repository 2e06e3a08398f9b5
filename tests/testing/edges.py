"""Ends of edges that are seen through."""

from __future__ import annotations

import queue
from collections import deque
from typing import Any

from pglpipe.messages.commands import Command, Message
from pglpipe.messages.packet import Packet


class Memory:
    """An end on either side: gives the messages that it has, and keeps those that it is given."""

    waited = 0.0
    sent_bytes = 0

    def __init__(self, *messages: Message) -> None:
        self.messages = deque(messages)

    def get(self) -> Message:
        """The first message."""
        return self.messages.popleft()

    def put(self, message: Message) -> None:
        """Keeps a message."""
        self.messages.append(message)

    @property
    def commands(self) -> list[Any]:
        """The commands of the messages that are there."""
        return [message.command for message in self.messages]


class Line:
    """An edge between two threads that has room for so many messages, and remembers the commands."""

    waited = 0.0
    sent_bytes = 0

    def __init__(self, room: int) -> None:
        self.messages: queue.Queue[Message] = queue.Queue(room)
        self.commands: list[Command] = []

    def put(self, message: Message) -> None:
        """Sends a copy; waits for room."""
        copies = Packet({name: t.clone() for name, t in message.packet.items()})
        self.messages.put(Message(message.command, copies), timeout=20)
        self.commands.append(message.command)

    def get(self) -> Message:
        """The next message; waits for one."""
        return self.messages.get(timeout=20)


class Nowhere(Line):
    """Where the ends of the pipeline send to."""

    def put(self, message: Message) -> None:
        """Remembers the command alone."""
        self.commands.append(message.command)
