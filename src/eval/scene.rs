//! The scenes that the bundled model was trained on: their captions, and how they are drawn exactly.
//! Reading them off a picture is `detect`'s business.

use std::fmt;

use rand_mt::Mt;

use crate::sample::png::Picture;

/// Radius of every shape, as a share of the picture's side.
pub const RADIUS: f64 = 0.2;

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

impl Colour {
    /// Red, green and blue, 0 to 255.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::Red => [220, 40, 40],
            Self::Green => [40, 170, 60],
            Self::Blue => [40, 80, 220],
            Self::Yellow => [240, 210, 40],
            Self::Purple => [150, 60, 190],
            Self::Orange => [245, 130, 30],
        }
    }
}

impl Background {
    /// Red, green and blue, 0 to 255.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::White => [250; 3],
            Self::Black => [15; 3],
            Self::Gray => [128; 3],
        }
    }
}

impl Place {
    /// x and y, as shares of the side.
    pub fn at(self) -> [f64; 2] {
        match self {
            Self::Left => [0.25, 0.5],
            Self::Right => [0.75, 0.5],
            Self::Top => [0.5, 0.25],
            Self::Bottom => [0.5, 0.75],
            Self::Centre => [0.5, 0.5],
        }
    }
}

impl Relation {
    /// Where the first and the second object go.
    fn places(self) -> [Place; 2] {
        match self {
            Self::LeftOf => [Place::Left, Place::Right],
            Self::RightOf => [Place::Right, Place::Left],
            Self::Above => [Place::Top, Place::Bottom],
            Self::Below => [Place::Bottom, Place::Top],
        }
    }
}

impl Shape {
    /// Signed distance, negative inside, of (x, y) from the outline of a shape of radius `r` around the origin; y
    /// points down.
    pub fn distance(self, x: f64, y: f64, r: f64) -> f64 {
        match self {
            Self::Circle => x.hypot(y) - r,
            Self::Square => x.abs().max(y.abs()) - 0.86 * r,
            Self::Triangle => {
                let slope = 0.4472 * (y + r);
                (y - 0.75 * r)
                    .max(0.8944 * x - slope)
                    .max(-0.8944 * x - slope)
            }
            Self::Cross => {
                let (x, y, bar) = (x.abs(), y.abs(), 0.36 * r);
                (x - bar).max(y - r).min((x - r).max(y - bar))
            }
        }
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

/// An object with its centre and radius, as shares of the picture's side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Placed {
    /// What it is.
    pub object: Object,
    /// Centre from the left.
    pub x: f64,
    /// Centre from the top.
    pub y: f64,
    /// Radius.
    pub r: f64,
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

    /// The objects where the scene has them, exactly in the middle of what counts as right.
    pub fn placed(&self) -> Vec<Placed> {
        let put = |object, place: Place| {
            let [x, y] = place.at();
            let r = RADIUS;
            Placed { object, x, y, r }
        };
        match self.layout {
            Layout::One(object, place) => vec![put(object, place)],
            Layout::Two(first, relation, second) => {
                let [a, b] = relation.places();
                vec![put(first, a), put(second, b)]
            }
        }
    }
}

/// Draws objects on a background, the later ones above; edges are smoothed over one pixel.
pub fn render(background: Background, objects: &[Placed], side: usize) -> Picture {
    let mut values: Vec<f32> = background.rgb().map(f32::from).repeat(side * side);
    let scale = side as f64;
    for placed in objects {
        let colour = placed.object.colour.rgb();
        for (i, pixel) in values.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let (x, y) = ((i % side) as f64 + 0.5, (i / side) as f64 + 0.5);
            let (x, y) = (x - placed.x * scale, y - placed.y * scale);
            let distance = placed.object.shape.distance(x, y, placed.r * scale);
            let cover = (0.5 - distance).clamp(0.0, 1.0) as f32;
            for (value, colour) in pixel.iter_mut().zip(colour) {
                *value = *value * (1.0 - cover) + cover * f32::from(colour);
            }
        }
    }
    let rgb = values.iter().map(|v| v.round_ties_even() as u8).collect();
    let side = side as u32;
    Picture {
        width: side,
        height: side,
        rgb,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_caption_of_the_list_is_parsed_and_said_again() {
        let list = include_str!("../../configs/tiny/prompts.txt");
        for caption in list.lines() {
            let scene = Scene::parse(caption).unwrap();
            assert_eq!(scene.to_string(), caption);
        }
    }

    #[test]
    fn other_texts_are_not_scenes() {
        for text in [
            "",
            "a photo of a cat",
            "a red circle",
            "a red circle on a white background",
            "a red circle at the left on a pink background",
            "a red hexagon at the left on a white background",
            "a red circle near a blue square on a white background",
            "a red circle left of a blue square at the top on a white background",
            "a red circle left of a blue square",
            "the red circle at the left on a white background",
        ] {
            assert_eq!(Scene::parse(text), None, "{text}");
        }
    }

    #[test]
    fn drawn_scenes_are_of_the_grammar_and_depend_on_the_seed() {
        let draw = |seed| Scene::draw(200, seed).collect::<Vec<_>>();
        let scenes = draw(1);
        assert_eq!(scenes, draw(1));
        assert_ne!(scenes, draw(2));
        let singles = scenes.iter().filter(|s| s.objects().len() == 1).count();
        assert!((40..100).contains(&singles), "{singles}");
        for scene in scenes {
            assert_eq!(Scene::parse(&scene.to_string()), Some(scene));
            if let [a, b] = scene.objects()[..] {
                assert_ne!(a.colour, b.colour);
            }
        }
    }
}
