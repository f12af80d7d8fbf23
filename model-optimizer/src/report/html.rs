//! HTML and SVG. What comes from outside gets into a page only as text or as an attribute's value, and is escaped there.

use std::fmt::{self, Display, Write as _};

/// A piece of a page.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Html(String);

impl Html {
    /// Markup of the page's own.
    pub(super) fn own(markup: &'static str) -> Self {
        Self(markup.to_owned())
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromIterator<Html> for Html {
    fn from_iter<I: IntoIterator<Item = Html>>(pieces: I) -> Self {
        Self(pieces.into_iter().map(|piece| piece.0).collect())
    }
}

/// `content` as text.
pub(super) fn text(content: impl Display) -> Html {
    let mut html = String::new();
    write_escaped(&mut html, &content);
    Html(html)
}

/// `content` as the name of something, which may be broken after its parts.
pub(super) fn name(content: &str) -> Html {
    let parts = content.split_inclusive(['.', '/', '_', ':']);
    parts.flat_map(|part| [text(part), Html::own("<wbr>")]).collect()
}

/// An attribute with its value.
pub(super) type Attribute<'a> = (&'static str, &'a dyn Display);

/// An element that holds `content`.
pub(super) fn element(name: &'static str, attributes: &[Attribute], content: impl IntoIterator<Item = Html>) -> Html {
    let mut html = format!("<{name}");
    for (attribute, value) in attributes {
        html.push(' ');
        html.push_str(attribute);
        html.push_str("=\"");
        write_escaped(&mut html, value);
        html.push('"');
    }
    html.push('>');
    html.extend(content.into_iter().map(|piece| piece.0));
    html.push_str("</");
    html.push_str(name);
    html.push('>');
    Html(html)
}

/// An element of one class that holds a text.
pub(super) fn labelled(name: &'static str, class: &'static str, content: impl Display) -> Html {
    element(name, &[("class", &class)], [text(content)])
}

fn write_escaped(html: &mut String, content: &dyn Display) {
    // A string takes all that is written to it.
    let _ = write!(Escaping(html), "{content}");
}

/// Escapes what is written (HTML Living Standard, "Escaping a string").
struct Escaping<'a>(&'a mut String);

impl fmt::Write for Escaping<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            match character {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                // No page holds a zero character.
                '\0' => self.0.push('\u{fffd}'),
                other => self.0.push(other),
            }
        }
        Ok(())
    }
}

/// A column of a table.
pub(super) struct Column {
    title: &'static str,
    class: &'static str,
}

/// A column of words.
pub(super) const fn words(title: &'static str) -> Column {
    Column { title, class: "words" }
}

/// A column of names, which may be broken anywhere.
pub(super) const fn names(title: &'static str) -> Column {
    Column { title, class: "name" }
}

/// A column of numbers.
pub(super) const fn numbers(title: &'static str) -> Column {
    Column { title, class: "number" }
}

/// A table; what is beyond the first `shown` rows is folded away.
pub(super) fn table(columns: &[Column], mut rows: Vec<Vec<Html>>, shown: usize) -> Html {
    let more = rows.split_off(rows.len().min(shown));
    let first = plain_table(columns, rows);
    if more.is_empty() {
        return first;
    }
    let summary = element("summary", &[], [text(format_args!("{} more", more.len()))]);
    [first, element("details", &[], [summary, plain_table(columns, more)])]
        .into_iter()
        .collect()
}

fn plain_table(columns: &[Column], rows: Vec<Vec<Html>>) -> Html {
    let heads = columns.iter().map(|column| labelled("th", column.class, column.title));
    let head = element("thead", &[], [element("tr", &[], heads)]);
    let row = |cells: Vec<Html>| {
        let cells = cells.into_iter().zip(columns);
        element(
            "tr",
            &[],
            cells.map(|(cell, column)| element("td", &[("class", &column.class)], [cell])),
        )
    };
    let body = element("tbody", &[], rows.into_iter().map(row));
    element("div", &[("class", &"scroll")], [element("table", &[], [head, body])])
}

/// A part of the page with its title and what it says of itself.
pub(super) fn section(title: &'static str, says: impl Display, content: impl IntoIterator<Item = Html>) -> Html {
    let head = [element("h2", &[], [text(title)]), labelled("p", "says", says)];
    element("section", &[], head.into_iter().chain(content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_values_are_escaped_and_markup_is_not() {
        let html = element(
            "p",
            &[("title", &"a\"b")],
            [text("<script>alert('&')</script>\0"), Html::own("<br>")],
        );
        assert_eq!(
            html.as_str(),
            "<p title=\"a&quot;b\">&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;\u{fffd}<br></p>"
        );
    }

    #[test]
    fn a_long_table_is_folded() {
        let rows = |count: usize| (0..count).map(|row| vec![text(row)]).collect();
        let short = table(&[numbers("n")], rows(3), 3);
        assert!(!short.as_str().contains("<details>"));
        let long = table(&[numbers("n")], rows(5), 3);
        assert!(long.as_str().contains("<summary>2 more</summary>"));
        assert_eq!(long.as_str().matches("<td class=\"number\">").count(), 5);
    }
}
