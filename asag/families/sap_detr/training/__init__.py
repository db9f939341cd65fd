"""How SAP-DETR trains."""
