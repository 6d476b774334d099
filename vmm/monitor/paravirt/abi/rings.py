"""Shared pages: the console's ring, XenStore's ring and wire protocol, grant table entries.

Sources: Xen's public headers io/console.h, io/xs_wire.h, grant_table.h; docs/misc/xenstore.txt.
"""

from __future__ import annotations

import struct
from enum import IntEnum

# struct xencons_interface: two rings, and how far each side is
CONSOLE_IN, CONSOLE_IN_SIZE = 0, 1024
CONSOLE_OUT, CONSOLE_OUT_SIZE = 1024, 2048
CONSOLE_IN_CONS, CONSOLE_IN_PROD, CONSOLE_OUT_CONS, CONSOLE_OUT_PROD = 3072, 3076, 3080, 3084

# struct xenstore_domain_interface
STORE_RING = 1024
STORE_REQ, STORE_RSP = 0, 1024
STORE_REQ_CONS, STORE_REQ_PROD, STORE_RSP_CONS, STORE_RSP_PROD = 2048, 2052, 2056, 2060
STORE_HEADER = struct.Struct("<IIII")  # type, request, transaction, length
STORE_PAYLOAD_MAX = 4096
STORE_PATH_MAX = 3072


class StoreOp(IntEnum):
    """`xsd_sockmsg_type`."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21


class GrantOp(IntEnum):
    """`GNTTABOP_*`."""

    MAP_GRANT_REF = 0
    UNMAP_GRANT_REF = 1
    SETUP_TABLE = 2
    DUMP_TABLE = 3
    TRANSFER = 4
    COPY = 5
    QUERY_SIZE = 6
    UNMAP_AND_REPLACE = 7
    SET_VERSION = 8
    GET_STATUS_FRAMES = 9
    GET_VERSION = 10
    SWAP_GRANT_REF = 11
    CACHE_FLUSH = 12


GNTST_OKAY, GNTST_GENERAL_ERROR, GNTST_BAD_DOMAIN = 0, -1, -2
SETUP_TABLE = struct.Struct("<H2xIh2xI")  # domain, frames; status, list
QUERY_SIZE = struct.Struct("<H2xIIh2x")  # domain; frames, most frames, status
GET_VERSION = struct.Struct("<H2xI")
SET_VERSION = struct.Struct("<I")
GRANT_ENTRY = struct.Struct("<HHI")  # flags, domain, frame (version 1)
GTF_PERMIT_ACCESS = 1
GRANT_CONSOLE, GRANT_STORE = 0, 1  # reserved references
