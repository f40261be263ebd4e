"""Words of the small presets' word-level tokenizer: the synthetic benchmark's grammar and everyday words of short expressions."""

from __future__ import annotations

__all__ = ["WORDS"]

_FUNCTION = """
a an all and any are at both but by does each every except everything excluding for from has have in is it its just neither no
not of off on one ones only or other others out that the their them there these thing things this those to two three four five
six seven eight nine ten under up very which who with without object objects item items anything something , . ' -
"""
_PLACE = """
above behind below beneath beside between bottom center centre closest corner down edge far farthest front furthest half left
leftmost lower lowest middle near nearest next over placed right rightmost side standing sitting top topmost upper highest
bottommost
"""
_LOOK = """
big black blue bright brown checked checkered cyan dark dotted gray green grey huge large larger largest light magenta orange
patterned pink plain purple red shape shaped shapes size small smaller smallest solid spotted striped stripes teal tiny white
yellow color colored colour coloured filled dots
"""
_SHAPE = """
arrow arrows bar bars circle circles cross crosses diamond diamonds disc discs ellipse ellipses heart hearts hexagon hexagons
moon moons oval ovals pentagon pentagons plus pluses rectangle rectangles ring rings square squares star stars triangle
triangles
"""
_THINGS = """
airplane airplanes apple apples backpack backpacks ball banana bananas baseball bat bear bears bed beds bench benches bicycle
bicycles bike bird birds boat boats book books bottle bottles bowl bowls boy boys broccoli bus buses cake cakes car cars
carrot carrots cat cats cell chair chairs child children clock clocks couch couches cow cows cup cups desk dining dog dogs
donut donuts door drink dryer elephant elephants fire fork forks frisbee fruit giraffe giraffes girl girls glass glove guy
hair handbag handbags horse horses hot hydrant keyboard keyboards kid kids kite kites knife knives lady laptop laptops man
meter microwave men motorcycle motorcycles mouse orange oranges oven ovens parking people person persons phone phones picture
pizza pizzas plant plants player potted racket refrigerator remote remotes sandwich sandwiches scissors sheep shirt sign sink
sinks skateboard skateboards ski skis snowboard snowboards spoon spoons sports stop suitcase suitcases surfboard surfboards
table tables teddy tennis tie ties toaster toilet toilets toothbrush toothbrushes traffic train trains tree truck trucks tv
tvs umbrella umbrellas van vase vases wall water window wine woman women zebra zebras
"""

WORDS: tuple[str, ...] = tuple(sorted({word for text in (_FUNCTION, _PLACE, _LOOK, _SHAPE, _THINGS) for word in text.split()}))
"""All words, sorted."""
