"""The table of a race."""

from rounds import ratio

WIDTHS = (14, 28, 30, 30, 22)


def heading(o, card):
    side = "darkroom" if o.darkroom else "darkroom (no binary given)"
    first = f"FLUX.1 {o.size}, random weights, {o.device}; {card}; A = {side}, B = the peer; {o.rounds} rounds in turn, after {o.warm_ups} that warm up"
    second = "median ms (fastest to slowest); B/A is how many times as long the peer takes (lowest to highest of the rounds)"
    return "\n".join([first, second, "", row("peer", "run", "darkroom", "peer", "B/A"), row(*("-" * (width - 2) for width in WIDTHS))])


def row(*cells):
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS)).rstrip()


def lines(result):
    sides = result["sides"]
    measures = next((list(side["measures"]) for side in sides.values() if "measures" in side), [""])
    peer = result["peer"]
    if len(peer) >= WIDTHS[0]:
        yield peer
        peer = ""
    for measure in measures:
        name = f"{result['run']} {measure}".strip()
        compared = ratio(sides, measure)
        cell = f"{compared['median']:.2f} ({compared['lowest']:.2f} to {compared['highest']:.2f})" if compared else "-"
        yield row(peer, name, times(sides["A"], measure), times(sides["B"], measure), cell)
    for key, who in (("A", "darkroom"), ("B", result["peer"])):
        side = sides[key]
        if "absent" in side and side["absent"] != "not asked for":
            yield f"    {who} is absent: {side['absent']}"
        if side.get("clocks"):
            clocks = side["clocks"]
            yield f"    {who}: {clocks['sm_mhz']:.0f} MHz, {clocks['watts']:.0f} W, {clocks['celsius']:.0f} °C ({clocks['samples']} samples)"
    yield from notes(result)
    if result.get("warning"):
        yield f"    {result['warning']}"


def notes(result):
    """What is paid once."""
    side, about = result["sides"]["B"], result["about"]["B"] or {}
    found = []
    if side.get("first_turn_s", 0) >= 5:
        found.append(f"the first turn, compilation included, took {side['first_turn_s']:.0f} s")
    if about.get("peak_gb"):
        found.append(f"{about['peak_gb']:.1f} GB at most")
    # Only darkroom has one: it is why its two sides differ.
    if about.get("plan"):
        found.append(about["plan"])
    if found:
        yield f"    {result['peer']}: {'; '.join(found)}"


def times(side, measure):
    if "absent" in side:
        return "absent" if side["absent"] != "not asked for" else "-"
    found = side["measures"][measure]
    return f"{digits(found['median'])} ({digits(found['fastest'])} to {digits(found['slowest'])})"


def digits(ms):
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def ending(races, no_clocks):
    """Versions, and why there are no clocks."""
    abouts = [about for race in races for about in race["about"].values() if about and "absent" not in about]
    for name in ("version", "kernels", "torch", "diffusers", "transformers", "device", "dtype"):
        values = sorted({about[name] for about in abouts if name in about})
        if values:
            yield f"{'darkroom' if name == 'version' else name}: {', '.join(values)}"
    if no_clocks:
        yield f"clocks: {no_clocks}"
