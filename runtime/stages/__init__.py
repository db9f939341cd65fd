"""The stages that a forward pass names: seen in an exported file, compared, drawn, and told apart in a graph."""
