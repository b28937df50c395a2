"""The atlas: where a model keeps its heads, MLPs and layers; plain data, read once from the module tree."""

from nnsplice.atlas.atlas import Atlas as Atlas
from nnsplice.atlas.atlas import fingerprint as fingerprint
from nnsplice.atlas.attached import AttachedSae as AttachedSae
from nnsplice.atlas.attached import attach as attach
from nnsplice.atlas.attached import attached as attached
from nnsplice.atlas.attached import detach as detach
from nnsplice.atlas.attached import host as host
from nnsplice.atlas.block import Block as Block
from nnsplice.atlas.block import Tower as Tower
from nnsplice.atlas.choose import Doubt as Doubt
from nnsplice.atlas.choose import reads_text as reads_text
from nnsplice.atlas.drawing import ParameterShare as ParameterShare
from nnsplice.atlas.drawing import by_number as by_number
from nnsplice.atlas.drawing import draw as draw
from nnsplice.atlas.layouts import Layout as Layout
from nnsplice.atlas.order import Order as Order
from nnsplice.atlas.refusals import edges_between_towers as edges_between_towers
from nnsplice.atlas.selection import ParameterSlice as ParameterSlice
from nnsplice.atlas.selection import Selection as Selection
from nnsplice.atlas.selection import rest_of as rest_of
from nnsplice.atlas.shards import refuse_sharded as refuse_sharded
from nnsplice.atlas.shards import whole_here as whole_here
from nnsplice.atlas.site import DERIVED as DERIVED
from nnsplice.atlas.site import Site as Site
from nnsplice.atlas.site import SiteKind as SiteKind
from nnsplice.atlas.site import native_text as native_text
from nnsplice.atlas.tree import text_config as text_config
from nnsplice.atlas.unwrap import unwrap as unwrap
from nnsplice.atlas.verify import Check as Check

#: What users need of it; the rest is for the rooms above.
__all__ = ["Atlas", "Selection", "unwrap"]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
