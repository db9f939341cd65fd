"""The layouts of data set folders: where a split's pictures and boxes are, and the boxes as COCO's format says them."""
