"""Files: read within limits, written whole, folders that are ours, the user's cache, the commit that runs."""

from fewstep.files.folders import (
    LOCK as LOCK,
    MARK as MARK,
    check_ours as check_ours,
    empty as empty,
    lock_taken as lock_taken,
    locked as locked,
    read_mark as read_mark,
    strangers as strangers,
    take as take,
    whole_folder as whole_folder,
    write_mark as write_mark,
)
from fewstep.files.places import (
    cache_dir as cache_dir,
    commit as commit,
    dirty as dirty,
    expanded as expanded,
    refuse_world_writable as refuse_world_writable,
)
from fewstep.files.read import (
    BLOCK as BLOCK,
    JSON_BYTES as JSON_BYTES,
    JSON_DEPTH as JSON_DEPTH,
    SPREAD as SPREAD,
    WHOLE as WHOLE,
    crc32_of as crc32_of,
    digest_of as digest_of,
    file_sha256 as file_sha256,
    lines_of as lines_of,
    parse_json as parse_json,
    prompt_of as prompt_of,
    read_json as read_json,
    regular as regular,
    text_of as text_of,
)
from fewstep.files.write import (
    LEFTOVER as LEFTOVER,
    aside_name as aside_name,
    atomic_path as atomic_path,
    clear_leftovers as clear_leftovers,
)
