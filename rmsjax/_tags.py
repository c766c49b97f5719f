"""`tag_tree` marks values inside any JAX function; `run` calls a function and brings the values that it marked out.

A tag is a primitive: the identity, which lowers to nothing. To get at tagged values, `run` traces the function to a
jaxpr and evaluates it. Equations without a tag inside are left to JAX. Each control-flow equation with a tag inside is
called anew with the tagged values as further results, reduced where they arise: so no tracer crosses a boundary, and
of an activation inside a loop nothing but its reduced value is kept.

The derivative of a tag marks the tangent, with a linear primitive whose transpose tags the cotangent. A function that
takes a gradient therefore has the cotangents of its tagged points among its tags.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir, partial_eval


class Mark(NamedTuple):
    """What is static about a tagged array: one leaf of the tree that was given to one call of `tag_tree`."""

    name: str
    call: int  # no two calls have the same, though a function that JAX traced once and runs twice repeats its own
    leaf: int  # its number among all leaves of the tree, also those that are no arrays
    path: str
    treedef: Any
    cotangent: bool = False
    batch_axes: tuple[int, ...] = ()  # where vmap has put its axes, the innermost vmap first


class Entry(NamedTuple):
    """A tagged array, reduced. Its leading axes are those of the loops ("scan") and meshes ("shard") it was in."""

    mark: Mark
    value: Any
    axes: tuple[str, ...] = ()


Found = tuple[list[Any], list[Entry]]  # the results of an equation or a jaxpr, and what was tagged inside


# ------------------------------------------------------------------------------------------------------ the primitives

_tag_p = core.Primitive("rmsjax_tag")
_tangent_p = core.Primitive("rmsjax_tag_tangent")
_calls = itertools.count()


def tag_tree(tree: Any, name: str) -> Any:
    """The same tree; its arrays are tagged, all else is left alone."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    call = next(_calls)

    def tagged(leaf: int, path: Any, x: Any) -> Any:
        if not is_array(x):
            return x
        return _tag_p.bind(x, mark=Mark(name, call, leaf, jax.tree_util.keystr(path), treedef))

    return treedef.unflatten([tagged(leaf, *entry) for leaf, entry in enumerate(leaves)])


def is_array(x: Any) -> TypeGuard[Array]:
    """Whether x is an array for JAX, traced or not. NumPy has dtypes that JAX has not: records, dates, long doubles."""
    if isinstance(x, (np.ndarray, np.generic)):
        with contextlib.suppress(TypeError, ValueError):
            return jax.typeof(x) is not None
    return isinstance(x, Array)


def _batch(primitive: Any) -> Callable[..., Any]:
    def rule(args: Any, dims: Any, *, mark: Mark) -> Any:
        ((x,), (dim,)) = args, dims
        return primitive.bind(x, mark=mark._replace(batch_axes=(*mark.batch_axes, dim))), dim

    return rule


def _tag_jvp(primals: Any, tangents: Any, *, mark: Mark) -> Any:
    ((x,), (t,)) = primals, tangents
    if not (mark.cotangent or isinstance(t, ad.Zero)):
        t = _tangent_p.bind(t, mark=mark)
    return _tag_p.bind(x, mark=mark), t


def _transpose(ct: Any, x: Any, *, mark: Mark) -> Any:
    del x
    return [ct if mark.cotangent or isinstance(ct, ad.Zero) else _tag_p.bind(ct, mark=mark._replace(cotangent=True))]


for _primitive in (_tag_p, _tangent_p):
    _primitive.def_impl(lambda x, *, mark: x)
    _primitive.def_abstract_eval(lambda x, *, mark: x)
    mlir.register_lowering(_primitive, lambda ctx, x, *, mark: [x])
    batching.primitive_batchers[_primitive] = _batch(_primitive)
    ad.primitive_transposes[_primitive] = _transpose
ad.primitive_jvps[_tag_p] = _tag_jvp
ad.primitive_jvps[_tangent_p] = lambda primals, tangents, *, mark: (_tangent_p.bind(*primals, mark=mark), *tangents)


# ---------------------------------------------------------------------------------------------------------- evaluation


def run(fn: Callable[..., Any], args: Any, kwargs: Any, reduce: Callable[[Array], Any]) -> tuple[Any, list[Entry]]:
    """fn(*args, **kwargs), and what it tagged in the order of the program, each array reduced by `reduce`.

    Arrays in the arguments are traced, as under jit; all else reaches fn as it is.
    """
    arrays, join = partition((args, kwargs))
    joins: list[Callable[[Iterable[Any]], Any]] = []

    def flat(*arrays: Any) -> list[Any]:
        args, kwargs = join(arrays)
        out, join_out = partition(fn(*args, **kwargs))
        joins[:] = [join_out]
        return out

    jaxpr = jax.make_jaxpr(flat)(*arrays)
    if _calls_exported(jaxpr):
        _warn("an exported function")
    out, entries = _Collector(reduce).evaluate(jaxpr, arrays)
    return joins[0](out), entries


def partition(tree: Any, chosen: Callable[[Any], bool] = is_array) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """The chosen leaves of a tree, and the function that makes a tree of it again from others in their place."""
    leaves, treedef = jax.tree.flatten(tree)
    rest = [None if chosen(leaf) else (leaf,) for leaf in leaves]  # without arrays: a tracer kept here would leak
    return (
        [leaf for leaf, other in zip(leaves, rest, strict=True) if other is None],
        lambda others: treedef.unflatten(fill_in(rest, others)),
    )


def arrays_of(kind: Any, reduce: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """The reduction, for arrays of a kind only; others, and those without elements, have no value."""
    return lambda x: reduce(x) if jnp.issubdtype(x.dtype, kind) and x.size else None


def fill_in(static: Iterable[tuple[Any] | None], arrays: Iterable[Any]) -> list[Any]:
    """The leaves of a tree, of which `static` has those that are no arrays, as tuples of one."""
    given = iter(arrays)
    return [next(given) if leaf is None else leaf[0] for leaf in static]


class _Collector(NamedTuple):
    reduce: Callable[[Array], Any]
    recomputing: bool = False  # in the backward pass of a checkpoint, which repeats values of the forward pass

    def wants(self, mark: Mark) -> bool:
        return mark.cotangent or not self.recomputing

    def inside(self, eqn: Any) -> _Collector:
        return self._replace(recomputing=True) if eqn.params.get("differentiated") is True else self

    def finds_tags(self, jaxpr: Any) -> bool:
        return any(self.is_tagged(eqn) for eqn in _open(jaxpr)[0].eqns)

    def is_tagged(self, eqn: Any) -> bool:
        if eqn.primitive is _tag_p:
            return self.wants(eqn.params["mark"])
        return any(map(self.inside(eqn).finds_tags, _jaxprs_of(eqn)))

    def evaluate(self, jaxpr: Any, args: Sequence[Any]) -> Found:
        jaxpr, consts = _open(jaxpr)
        env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        last_use = {v: k for k, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
        last_use.update(dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns)))
        entries: list[Entry] = []
        start = 0
        for k, eqn in enumerate(jaxpr.eqns):
            if self.is_tagged(eqn):
                _evaluate_plain(jaxpr, start, k, last_use, env)
                start = k + 1
                with eqn.ctx.manager:
                    outs, found = self.evaluate_tagged(eqn, _read(env, eqn.invars))
                env.update(zip(eqn.outvars, outs, strict=True))
                entries += found
        _evaluate_plain(jaxpr, start, len(jaxpr.eqns), last_use, env)
        return _read(env, jaxpr.outvars), entries

    def evaluate_tagged(self, eqn: Any, args: list[Any]) -> Found:
        if eqn.primitive is not _tag_p:
            return _RULES.get(eqn.primitive.name, _call)(self.inside(eqn), eqn, args)
        (x,), mark = args, eqn.params["mark"]
        for k, axis in enumerate(reversed(mark.batch_axes)):
            x = jnp.moveaxis(x, axis + k, k)
        return args, [Entry(mark, self.reduce(x))]

    def staged(self, jaxpr: Any) -> tuple[Callable[..., tuple[list[Any], list[Any]]], list[Entry]]:
        """`evaluate` as a function of the arguments that can be given to a transformation, and a list of the entries.

        The function returns arrays only. The list, of entries without values, is there once the function was traced.
        """
        entries: list[Entry] = []

        def fn(*args: Any) -> tuple[list[Any], list[Any]]:
            outs, found = self.evaluate(jaxpr, args)
            entries[:] = [entry._replace(value=None) for entry in found]
            return outs, [entry.value for entry in found]

        return fn, entries


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants. Before jax 0.12 open and closed jaxprs are of two classes."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _jaxprs_of(eqn: Any) -> Iterable[Any]:
    params = [*eqn.params.values(), *getattr(eqn.params.get("_prim"), "params", {}).values()]  # see `_expand`
    for param in params:
        for part in param if isinstance(param, (tuple, list)) else (param,):
            if hasattr(part, "eqns"):  # open or closed
                yield part
            elif hasattr(getattr(part, "jaxpr", None), "eqns"):  # a traced function
                yield part.jaxpr


def _calls_exported(jaxpr: Any) -> bool:
    """Whether there is a function in it that came from elsewhere compiled, in which no tag is left to be found."""
    eqns = _open(jaxpr)[0].eqns
    return any(eqn.primitive.name == "call_exported" or any(map(_calls_exported, _jaxprs_of(eqn))) for eqn in eqns)


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _read(env: dict[Any, Any], atoms: Iterable[Any]) -> list[Any]:
    return [atom.val if isinstance(atom, core.Literal) else env[atom] for atom in atoms]


def _evaluate_plain(jaxpr: Any, start: int, stop: int, last_use: dict[Any, int], env: dict[Any, Any]) -> None:
    """Leave equations start to stop to JAX, and take over what is used after them."""
    if start == stop:
        return
    eqns = jaxpr.eqns[start:stop]
    used = list(dict.fromkeys(v for eqn in eqns for v in _variables(eqn.invars) if v in env))
    kept = [v for eqn in eqns for v in eqn.outvars if last_use.get(v, -1) >= stop]
    names = jaxpr.debug_info.with_unknown_names()
    part = jaxpr.replace(constvars=[], invars=used, outvars=kept, eqns=eqns, debug_info=names)
    env.update(zip(kept, jax.core.eval_jaxpr(part, [], *_read(env, used)), strict=True))


def _with_values(entries: list[Entry], values: Iterable[Any], axes: tuple[str, ...] = ()) -> list[Entry]:
    return [e._replace(value=v, axes=(*axes, *e.axes)) for e, v in zip(entries, values, strict=True)]


# --------------------------------------------------------------------------------------------------------------- names

Named: TypeAlias = OrderedDict[str, list[Entry]]  # the leaves of each tree that was tagged
Trees: TypeAlias = OrderedDict[str, Any]  # ordered, since jit sorts the keys of a dict


def by_name(entries: Iterable[Entry]) -> tuple[Named, Named]:
    """The values and the cotangents, by names that are not repeated."""
    values: dict[tuple[int, int], list[Entry]] = defaultdict(list)
    cotangents: dict[tuple[int, int], list[Entry]] = defaultdict(list)
    times: Counter[tuple[int, int]] = Counter()
    unmatched: dict[tuple[int, int], list[int]] = defaultdict(list)
    for entry in entries:
        call, leaf = entry.mark.call, entry.mark.leaf
        if entry.mark.cotangent and unmatched[call, leaf]:
            cotangents[call, unmatched[call, leaf].pop()].append(entry)  # the newest value first: that is backward
            continue
        time = times[call, leaf]
        times[call, leaf] += 1
        if entry.mark.cotangent:
            cotangents[call, time].append(entry)
        else:
            values[call, time].append(entry)
            unmatched[call, leaf].append(time)
    names: dict[tuple[int, int], str] = {}
    taken: set[str] = set()
    for key, leaves in (values | cotangents).items():
        name = leaves[0].mark.name
        labels = itertools.chain([name], (f"{name}#{n}" for n in itertools.count(2)))
        names[key] = next(label for label in labels if label not in taken)
        taken.add(names[key])
    return (
        OrderedDict((name, values[key]) for key, name in names.items() if key in values),
        OrderedDict((name, cotangents[key]) for key, name in names.items() if key in cotangents),
    )


def trees(named: Named) -> Trees:
    """The trees that were tagged, with None where there is no value.

    A node of the user's that holds a None may not have the leaves that it had, and so is not to be flattened again.
    """

    def tree(leaves: list[Entry]) -> Any:
        treedef, found = leaves[0].mark.treedef, {entry.mark.leaf: entry.value for entry in leaves}
        return treedef.unflatten([found.get(leaf) for leaf in range(treedef.num_leaves)])

    return OrderedDict((name, tree(leaves)) for name, leaves in named.items())


def flat(named: Named) -> Trees:
    """Each value by itself, under the name of its tree and its path in it."""
    return OrderedDict(
        (name + entry.mark.path, entry.value)
        for name, leaves in named.items()
        for entry in sorted(leaves, key=lambda entry: entry.mark.leaf)
        if entry.value is not None
    )


# -------------------------------------------------------------------------------------------------------- control flow


def _jit(collector: _Collector, eqn: Any, args: list[Any]) -> Found:
    params = eqn.params
    outs, entries = collector.evaluate(params["jaxpr"], list(map(_constrain, args, params["in_shardings"])))
    return list(map(_constrain, outs, params["out_shardings"])), entries


def _constrain(x: Any, sharding: Any) -> Any:
    return lax.with_sharding_constraint(x, sharding) if isinstance(sharding, jax.sharding.Sharding) else x


def _remat(collector: _Collector, eqn: Any, args: list[Any]) -> Found:
    prevent_cse = eqn.params["prevent_cse"]
    prevent_cse = any(prevent_cse) if isinstance(prevent_cse, tuple) else prevent_cse
    if collector.recomputing:
        # A barrier is all that a checkpoint comes to in a backward pass: it keeps XLA from taking results of the
        # forward pass, which it then would have to keep, for those that are to be computed again.
        return collector.evaluate(eqn.params["jaxpr"], lax.optimization_barrier(args) if prevent_cse else args)
    fn, entries = collector.staged(eqn.params["jaxpr"])
    outs, values = jax.checkpoint(fn, prevent_cse=prevent_cse, policy=eqn.params["policy"])(*args)
    return outs, _with_values(entries, values)


def _scan(collector: _Collector, eqn: Any, args: list[Any]) -> Found:
    params = eqn.params
    body, _ = _open(params["jaxpr"])
    # Which arguments are constants, carry and slices is told by their ranks: the parameter for it has another name and
    # form in jax 0.12.
    num_xs = sum(whole.aval.ndim > one.aval.ndim for whole, one in zip(eqn.invars, body.invars, strict=True))
    num_carry = sum(whole.aval.ndim == one.aval.ndim for whole, one in zip(eqn.outvars, body.outvars, strict=True))
    num_consts = len(args) - num_carry - num_xs
    consts, carry, xs = args[:num_consts], args[num_consts : num_consts + num_carry], args[num_consts + num_carry :]
    fn, entries = collector.staged(params["jaxpr"])

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], Any]:
        outs, values = fn(*consts, *carry, *x)
        return outs[:num_carry], (outs[num_carry:], values)

    carry, (ys, values) = lax.scan(
        step, carry, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *ys], _with_values(entries, values, ("scan",))


def _while(collector: _Collector, eqn: Any, args: list[Any]) -> Found:
    """A loop of unknown length has no place for a value from each iteration: that of the last one is kept.

    Under vmap the condition may have an axis for each vmap it depends on, and the loop runs until no lane is left.
    Lanes that are done keep what they have; so values are reduced after the loop, when each has its own last one.
    """
    params = eqn.params
    if collector.finds_tags(params["cond_jaxpr"]):
        _warn("the condition of a while_loop")
    cond, cond_consts = _open(params["cond_jaxpr"])
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    of_cond, consts, carry = args[:num_cond], args[num_cond : num_cond + num_body], args[num_cond + num_body :]
    lanes = cond.outvars[0].aval.shape
    fn, entries = (collector._replace(reduce=lambda x: x) if lanes else collector).staged(params["body_jaxpr"])
    _, shapes = jax.eval_shape(fn, *consts, *carry)
    places = _places_of_lanes(jax.make_jaxpr(fn)(*consts, *carry), num_body, entries, lanes) if lanes else []

    def runs(state: Any) -> Array:
        return jax.core.eval_jaxpr(cond, cond_consts, *of_cond, *state[0])[0]

    def step(state: Any) -> Any:
        outs, values = fn(*consts, *state[0])
        if not lanes:
            return outs, values
        going, (carry, before) = runs(state), state
        return (
            [_where(going, range(len(lanes)), new, old) for new, old in zip(outs, carry, strict=True)],
            [_where(going, *choice) for choice in zip(places, values, before, strict=True)],
        )

    outs, values = lax.while_loop(lambda state: jnp.any(runs(state)), step, (carry, blank(shapes)))
    if lanes:
        values = [_over_axes(collector.reduce, len(e.axes))(v) for e, v in zip(entries, values, strict=True)]
    return outs, _with_values(entries, values)


def _places_of_lanes(
    jaxpr: Any, num_consts: int, entries: list[Entry], lanes: tuple[int, ...]
) -> list[tuple[int, ...] | None]:
    """Where each value that a body of a loop gives after its results has the axes of the condition; None: nowhere.

    What a loop carries begins with these axes, and a value that depends on it has them among those of its vmaps, in the
    same order. If sizes leave a choice, each is followed through the body. What depends on constants alone is the same
    in all iterations, whatever axes it has.
    """
    body, _ = _open(jaxpr)
    num_outs, num_carry = len(body.outvars) - len(entries), len(body.invars) - num_consts
    pure = body.replace(eqns=[eqn for eqn in body.eqns if eqn.outvars])  # a print is kept, with all that it needs

    def place(k: int, entry: Entry) -> tuple[int, ...] | None:
        _, used = partial_eval.dce_jaxpr(pure, [j == k for j in range(len(body.outvars))])
        if not any(used[num_consts:]):
            return None
        shape, first = body.outvars[k].aval.shape, len(entry.axes)
        choices = [
            axes
            for axes in itertools.combinations(range(first, first + len(entry.mark.batch_axes)), len(lanes))
            if tuple(shape[axis] for axis in axes) == lanes
        ]
        if len(choices) > 1:
            starts = [[None] * num_consts + [lane] * num_carry for lane in range(len(lanes))]
            followed = tuple(_follow(body, start)[k] for start in starts)
            known = [axes for axes in choices if axes == followed]
            if not known:
                raise ValueError(
                    f"collect: the lanes of a while_loop under vmap end at different times, and in the array of shape "
                    f"{shape} tagged {entry.mark.name!r} they may be any of the axes {choices}, which are of one size; "
                    f"give the vmaps different sizes, or write vmap(collect(fn)) for collect(vmap(fn))"
                )
            choices = known
        return choices[0] if choices else None

    return [place(num_outs + k, entry) for k, entry in enumerate(entries)]


def _follow(jaxpr: Any, axes: Sequence[int | None]) -> list[int | None]:
    """Where the results of a jaxpr have the axis that its arguments have where `axes` says; None: that is not known."""
    body, _ = _open(jaxpr)
    env: dict[Any, int | None] = dict(zip(body.invars, axes, strict=True))

    def read(atoms: Iterable[Any]) -> list[int | None]:
        return [None if isinstance(atom, core.Literal) else env.get(atom) for atom in atoms]

    for eqn in body.eqns:
        env.update(zip(eqn.outvars, _follow_through(eqn, read(eqn.invars)), strict=True))
    return read(body.outvars)


def _follow_through(eqn: Any, axes: list[int | None]) -> list[int | None]:
    """The axis is given another size, and is where the results then have that size.

    An argument that is not known to have the axis is left as it is, or else has it at the same place: the equation
    takes one or the other, or neither, and then nothing is known of its results.
    """
    unknown: list[int | None] = [None] * len(eqn.outvars)
    known = {axis for axis in axes if axis is not None}
    if eqn.primitive.name == "while":
        start = eqn.params["cond_nconsts"]
        return _follow_into(eqn.params["body_jaxpr"], eqn.invars[start:], eqn.outvars, axes[start:])
    inside = eqn.params["jaxpr"] if eqn.primitive.name == "scan" else _inside(eqn)
    if inside is not None:
        return _follow_into(inside, eqn.invars, eqn.outvars, axes)
    if not known or any(_jaxprs_of(eqn)):
        return unknown
    if eqn.primitive.name == "broadcast_in_dim":  # its parameters have the sizes, and say what becomes of each axis
        return [eqn.params["broadcast_dimensions"][axes[0]]]
    avals = [atom.aval for atom in eqn.invars]
    size = next(aval.shape[axis] for aval, axis in zip(avals, axes, strict=True) if axis is not None)
    other_size = 1 + max(n for atom in (*eqn.invars, *eqn.outvars) for n in (*atom.aval.shape, 0))
    guesses = [axes]
    if len(known) == 1:
        (axis,) = known
        guesses.append([axis if aval.shape[axis : axis + 1] == (size,) else None for aval in avals])

    for guess in guesses:
        changed = [
            jax.ShapeDtypeStruct([other_size if k == axis else n for k, n in enumerate(aval.shape)], aval.dtype)
            for aval, axis in zip(avals, guess, strict=True)
        ]
        # Which error an equation has for shapes that do not fit its parameters is its own affair.
        with contextlib.suppress(Exception):
            shapes = [out.shape for out in jax.eval_shape(partial(_bind, eqn), *changed)]
            return [shape.index(other_size) if shape.count(other_size) == 1 else None for shape in shapes]
    return unknown


def _follow_into(jaxpr: Any, invars: Any, outvars: Any, axes: list[int | None]) -> list[int | None]:
    """As `_follow`, of an equation with the jaxpr inside: what a scan slices or stacks has an axis more outside."""
    body, _ = _open(jaxpr)

    def shifted(axes: list[int | None], outside: Any, inside: Any, sign: int) -> list[int | None]:
        more = [whole.aval.ndim - one.aval.ndim for whole, one in zip(outside, inside, strict=True)]
        moved = [None if axis is None else axis + sign * n for axis, n in zip(axes, more, strict=True)]
        return [None if axis == -1 else axis for axis in moved]

    return shifted(_follow(jaxpr, shifted(axes, invars, body.invars, -1)), outvars, body.outvars, 1)


def _where(mask: Array, place: Sequence[int] | None, new: Array, old: Array) -> Array:
    """new where the mask is true, whose axes are those of the arrays at `place`."""
    if place is None:
        return new
    return jnp.where(lax.broadcast_in_dim(mask, new.shape, place), new, old)


def _over_axes(fn: Callable[[Array], Any], count: int) -> Callable[[Array], Any]:
    for _ in range(count):
        fn = jax.vmap(fn)
    return fn


def _cond(collector: _Collector, eqn: Any, args: list[Any]) -> Found:
    """Tags of one name and shape in several branches are one."""
    index, operands = args[0], args[1:]
    staged = [collector.staged(jaxpr) for jaxpr in eqn.params["branches"]]
    shapes = [jax.eval_shape(fn, *operands)[1] for fn, _ in staged]
    keys = [_branch_keys(entries, shape) for (_, entries), shape in zip(staged, shapes, strict=True)]
    slots: dict[Any, tuple[Entry, Any]] = {}
    for k, (_, entries) in enumerate(staged):
        for key, entry, shape in zip(keys[k], entries, shapes[k], strict=True):
            slots.setdefault(key, (entry, shape))

    def branch(fn: Callable[..., Any], keys: list[Any]) -> Callable[..., Any]:
        def call(*operands: Any) -> tuple[list[Any], list[Any]]:
            outs, values = fn(*operands)
            own = dict(zip(keys, values, strict=True))
            return outs, [own[key] if key in own else blank(shape) for key, (_, shape) in slots.items()]

        return call

    calls = [branch(fn, keys[k]) for k, (fn, _) in enumerate(staged)]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        outs, values = lax.switch(index, calls, *operands)
    else:  # lowered is but the branch of the platform, since another may be impossible on it
        named = {name: call for names, call in zip(platforms, calls, strict=True) for name in names or ("default",)}
        outs, values = lax.platform_dependent(*operands, **named)
    return outs, _with_values([entry for entry, _ in slots.values()], values)


def _branch_keys(entries: list[Entry], shapes: list[Any]) -> list[Any]:
    """What tells an entry of a branch from the others: its name, which one of this name it is, and its shape."""
    seen: Counter[Any] = Counter()
    keys: list[Any] = []
    for entry, shape in zip(entries, shapes, strict=True):
        name = (entry.mark.name, entry.mark.cotangent, entry.mark.leaf)
        seen[name] += 1
        keys.append((*name, seen[name], jax.tree.structure(shape), *jax.tree.leaves(shape)))
    return keys


def blank(shapes: Any) -> Any:
    """What stands for values that are not there (yet): NaN, or 0 where there is no NaN."""

    def fill(shape: Any) -> Array:
        # full_like keeps the sharding and the manual axes, which are part of the type.
        return lax.full_like(shape, jnp.nan if jnp.issubdtype(shape.dtype, jnp.inexact) else 0)

    return jax.tree.map(fill, shapes)


def _shard_map(collector: _Collector, eqn: Any, args: list[Any]) -> Found:
    params = eqn.params
    names = params["manual_axes"] if "manual_axes" in params else params["newly_manual_axes"]  # renamed after jax 0.7
    fn, entries = collector.staged(params["jaxpr"])

    def local(*args: Any) -> tuple[list[Any], list[Any]]:
        outs, values = fn(*args)
        return outs, jax.tree.map(lambda value: value[None], values)

    outs, values = jax.shard_map(
        local,
        mesh=params["mesh"],
        in_specs=params["in_specs"],
        out_specs=(list(params["out_specs"]), jax.sharding.PartitionSpec(tuple(sorted(names)))),
        axis_names=names,
        check_vma=params["check_vma"],
    )(*args)
    return outs, _with_values(entries, values, ("shard",))


def _call(collector: _Collector, eqn: Any, args: list[Any]) -> Found:
    """Whatever has a rule of its own (custom_jvp, custom_vjp, custom_vmap) keeps it; its tags are evaluated beside it.

    XLA shares what the two compute. An inside that does not take these arguments and give these results does not run
    once as it stands (a linear solve, a kernel), and has no values to collect.
    """
    outs, inside = _bind(eqn, *args), _inside(eqn)
    if inside is None:
        _warn(eqn.primitive.name)
        return outs, []
    return outs, collector.evaluate(inside, args)[1]


def _bind(eqn: Any, *args: Any) -> Any:
    bound = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = bound if isinstance(bound, tuple) else ((), bound)  # a dict in later versions
    outs = eqn.primitive.bind(*subfuns, *args, **params)
    return outs if eqn.primitive.multiple_results else [outs]


def _inside(eqn: Any) -> Any:
    """The one jaxpr in an equation, if it takes the same arguments and gives the same results; None otherwise."""
    jaxprs = list(_jaxprs_of(eqn))
    if len(jaxprs) != 1:
        return None
    body, _ = _open(jaxprs[0])
    same = _types(body.invars) == _types(eqn.invars) and _types(body.outvars) == _types(eqn.outvars)
    return jaxprs[0] if same else None


def _expand(collector: _Collector, eqn: Any, args: list[Any]) -> Found:
    """A primitive that is defined in terms of others, as newer versions of jax have them: it keeps its own rules.

    Evaluated beside it is its definition.
    """
    definition = jax.make_jaxpr(partial(eqn.primitive.to_lojax, **eqn.params))(*args)
    return eqn.primitive.bind(*args, **eqn.params), collector.evaluate(definition, args)[1]


def _types(atoms: Iterable[Any]) -> list[Any]:
    return [(getattr(a.aval, "shape", None), getattr(a.aval, "dtype", None)) for a in atoms]


def _warn(where: str) -> None:
    warnings.warn(f"rmsjax.probe: what is tagged inside {where} is not collected", stacklevel=2)


_RULES: dict[str, Callable[[_Collector, Any, list[Any]], Found]] = {
    "jit": _jit,
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "call_hi_primitive": _expand,
}
