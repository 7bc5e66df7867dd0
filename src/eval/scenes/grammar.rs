//! The grammar of captions: what objects, places and relations there are, and captions drawn at random.

use std::fmt;

use rand_mt::Mt;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant),* }

        impl $name {
            /// All of them, in the order of the grammar.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// As captions say it.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.word())
            }
        }
    };
}

words! {
    /// Colour of an object.
    Colour {
        /// (220, 40, 40)
        Red = "red",
        /// (40, 170, 60)
        Green = "green",
        /// (40, 80, 220)
        Blue = "blue",
        /// (240, 210, 40)
        Yellow = "yellow",
        /// (150, 60, 190)
        Purple = "purple",
        /// (245, 130, 30)
        Orange = "orange",
    }
}

words! {
    /// Colour behind the objects.
    Background {
        /// (250, 250, 250)
        White = "white",
        /// (15, 15, 15)
        Black = "black",
        /// (128, 128, 128)
        Gray = "gray",
    }
}

words! {
    /// Outline of an object.
    Shape {
        /// All points within the radius.
        Circle = "circle",
        /// 0.86 of the radius to each side.
        Square = "square",
        /// Apex up.
        Triangle = "triangle",
        /// Two bars of 0.36 of the radius to each side.
        Cross = "cross",
    }
}

words! {
    /// Where a single object is.
    Place {
        /// A quarter of the width.
        Left = "at the left",
        /// Three quarters of the width.
        Right = "at the right",
        /// A quarter of the height.
        Top = "at the top",
        /// Three quarters of the height.
        Bottom = "at the bottom",
        /// In the middle.
        Centre = "in the center",
    }
}

words! {
    /// Where the first of two objects is, seen from the second.
    Relation {
        /// Smaller x.
        LeftOf = "left of",
        /// Larger x.
        RightOf = "right of",
        /// Smaller y.
        Above = "above",
        /// Larger y.
        Below = "below",
    }
}

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its colour.
    pub colour: Colour,
    /// Its shape.
    pub shape: Shape,
}

/// How the objects lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One object at a place.
    One(Object, Place),
    /// Two objects, the first seen from the second.
    Two(Object, Relation, Object),
}

/// What a caption says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scene {
    /// The objects.
    pub layout: Layout,
    /// What is behind them.
    pub background: Background,
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a {} {}", self.colour, self.shape)
    }
}

impl fmt::Display for Scene {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.layout {
            Layout::One(object, place) => write!(f, "{object} {place}")?,
            Layout::Two(first, relation, second) => write!(f, "{first} {relation} {second}")?,
        }
        write!(f, " on a {} background", self.background)
    }
}

impl Scene {
    /// The scene of a caption; `None` when it is not one of the grammar.
    pub fn parse(caption: &str) -> Option<Self> {
        let rest = caption.trim().strip_suffix(" background")?;
        let (layout, background) = rest.rsplit_once(" on a ")?;
        let background = of(Background::ALL, Background::word, background)?;
        let (object, rest) = object(layout)?;
        let layout = match of(Place::ALL, Place::word, rest) {
            Some(place) => Layout::One(object, place),
            None => Relation::ALL.iter().find_map(|relation| {
                let second = rest.strip_prefix(relation.word())?.strip_prefix(' ')?;
                let second = self::object(&format!("{second} "))?.0;
                Some(Layout::Two(object, *relation, second))
            })?,
        };
        let scene = Self { layout, background };
        // what was passed over in parsing shows here
        (scene.to_string() == caption.trim()).then_some(scene)
    }

    /// The objects, in the order of the caption.
    pub fn objects(&self) -> Vec<Object> {
        match self.layout {
            Layout::One(object, _) => vec![object],
            Layout::Two(first, _, second) => vec![first, second],
        }
    }

    /// `count` scenes, about a third of them with one object; a seed gives the same ones everywhere. The colours of
    /// two objects differ.
    pub fn draw(count: usize, seed: u64) -> impl Iterator<Item = Self> {
        let mut random = Mt::new(seed as u32);
        (0..count).map(move |_| Self::one(&mut random))
    }

    fn one(random: &mut Mt) -> Self {
        let background = pick(random, Background::ALL);
        let object = |random: &mut Mt| Object {
            shape: pick(random, Shape::ALL),
            colour: pick(random, Colour::ALL),
        };
        let first = object(random);
        if share(random) < 0.35 {
            let layout = Layout::One(first, pick(random, Place::ALL));
            return Self { layout, background };
        }
        let mut second = object(random);
        while second.colour == first.colour {
            second = object(random);
        }
        let layout = Layout::Two(first, pick(random, Relation::ALL), second);
        Self { layout, background }
    }
}

/// An object at the start of a text that goes on after it.
fn object(text: &str) -> Option<(Object, &str)> {
    let rest = text.strip_prefix("a ")?;
    let (colour, rest) = rest.split_once(' ')?;
    let (shape, rest) = rest.split_once(' ')?;
    let colour = of(Colour::ALL, Colour::word, colour)?;
    let shape = of(Shape::ALL, Shape::word, shape)?;
    Some((Object { colour, shape }, rest))
}

fn of<T: Copy>(all: &[T], word: fn(T) -> &'static str, text: &str) -> Option<T> {
    all.iter().copied().find(|value| word(*value) == text)
}

fn share(random: &mut Mt) -> f64 {
    f64::from(random.next_u32()) / f64::from(u32::MAX)
}

fn pick<T: Copy>(random: &mut Mt, all: &[T]) -> T {
    // the bias of a remainder is below one in a hundred million here
    all[random.next_u32() as usize % all.len()]
}
