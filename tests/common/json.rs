//! The little of JSON that the fixtures' manifests need, so that they stay as their makers wrote them.

#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    Null,
    Bool(bool),
    Number(f64),
    String(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// # Panics
    /// When the text is not JSON.
    pub fn parse(text: &str) -> Self {
        let mut rest = text.trim_start();
        let value = value(&mut rest);
        assert!(rest.trim().is_empty(), "text after the JSON value: {rest:.40}");
        value
    }

    pub fn get(&self, key: &str) -> Option<&Json> {
        match self {
            Self::Object(fields) => fields.iter().find(|(name, _)| name == key).map(|(_, value)| value),
            _ => None,
        }
    }

    pub fn array(&self) -> &[Json] {
        match self {
            Self::Array(items) => items,
            _ => panic!("not an array: {self:?}"),
        }
    }

    pub fn text(&self) -> &str {
        match self {
            Self::String(text) => text,
            _ => panic!("not a string: {self:?}"),
        }
    }

    pub fn number(&self) -> f64 {
        match self {
            Self::Number(x) => *x,
            Self::Bool(x) => f64::from(u8::from(*x)),
            _ => panic!("not a number: {self:?}"),
        }
    }

    pub fn numbers(&self) -> Vec<f64> {
        self.array().iter().map(Self::number).collect()
    }

    /// A whole number under `key`.
    pub fn size(&self, key: &str) -> Option<usize> {
        self.get(key).map(|x| x.number() as usize)
    }
}

/// Drops `token` and the space around it, if it comes next.
fn take(rest: &mut &str, token: &str) -> bool {
    let found = rest.trim_start().strip_prefix(token);
    if let Some(after) = found {
        *rest = after.trim_start();
    }
    found.is_some()
}

fn value(rest: &mut &str) -> Json {
    if take(rest, "{") {
        let mut fields = Vec::new();
        while !take(rest, "}") {
            let Json::String(key) = value(rest) else { panic!("a key is a string: {rest:.40}") };
            assert!(take(rest, ":"), "no colon at {rest:.40}");
            fields.push((key, value(rest)));
            take(rest, ",");
        }
        Json::Object(fields)
    } else if take(rest, "[") {
        let mut items = Vec::new();
        while !take(rest, "]") {
            items.push(value(rest));
            take(rest, ",");
        }
        Json::Array(items)
    } else if let Some(text) = rest.strip_prefix('"') {
        let (text, after) = text.split_once('"').expect("a string ends");
        assert!(!text.contains('\\'), "the manifests use no escapes");
        *rest = after;
        Json::String(text.to_owned())
    } else {
        for (word, json) in [("true", Json::Bool(true)), ("false", Json::Bool(false)), ("null", Json::Null)] {
            if take(rest, word) {
                return json;
            }
        }
        let end = rest.find([',', ']', '}', ' ', '\n']).unwrap_or(rest.len());
        let (number, after) = rest.split_at(end);
        *rest = after;
        Json::Number(number.parse().unwrap_or_else(|_| panic!("not a number: {number}")))
    }
}
