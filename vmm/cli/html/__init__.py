"""A comparison as one file of HTML: `page` fills the template, `charts` draws. Imported only when asked for."""
