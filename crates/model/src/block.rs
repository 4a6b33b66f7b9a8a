//! A block is two sublayers on one residual stream.
//!   sublayer(x) = norm_out(body(norm_in(x)))
//!   sequential:  mid = x + s·attention(x),  y = mid + s·mlp(mid)
//!   parallel:    y = x + s·(attention(x) + mlp(x)); with one norm for both: of norm(x)
//! Kept for backward: mid, and what the bodies keep; normed inputs are computed again.

use ferrotune_nn::{Attention, Context, FeedForward, KeyValues, Layer, Norm, Parameter, SavedTensors};
use ferrotune_tensor::{Error, Result, Tensor};

use crate::spec::Residual;

/// A body between its norms.
pub struct Sublayer<Body> {
    /// Before the body.
    pub norm_in: Option<Norm>,
    /// Attention or mlp.
    pub body: Body,
    /// After the body.
    pub norm_out: Option<Norm>,
}

/// What [`Sublayer`]'s backward reads.
pub struct SublayerSaved<Saved> {
    body: Saved,
    /// (N, C): what `norm_out` read, where there is one.
    body_out: Option<Tensor>,
}

impl<Saved: SavedTensors> SavedTensors for SublayerSaved<Saved> {
    fn tensors(&mut self) -> Vec<&mut Tensor> {
        self.body.tensors().into_iter().chain(&mut self.body_out).collect()
    }
}

impl<Body: Layer> Sublayer<Body> {
    /// dy + dx on a GPU, with `room` columns to spare. dy has the room that the body wants.
    fn backward_joined(
        &mut self,
        ctx: &Context,
        x: &Tensor,
        saved: SublayerSaved<Body::Saved>,
        dy: &Tensor,
        room: usize,
    ) -> Result<Tensor> {
        let dx = self.body_backward(ctx, x, saved, dy.shared_rows(0..dy.rows())?)?;
        let norm =
            self.norm_in.as_mut().ok_or_else(|| Error::msg("a sublayer without the norm before it"))?;
        norm.backward_joined(x, dx, dy, room)
    }

    /// The gradient of what the body reads.
    fn body_backward(
        &mut self,
        ctx: &Context,
        x: &Tensor,
        saved: SublayerSaved<Body::Saved>,
        mut dy: Tensor,
    ) -> Result<Tensor> {
        if let (Some(norm), Some(body_out)) = (&mut self.norm_out, &saved.body_out) {
            dy = norm.backward(body_out, dy)?;
        }
        let normed = self.normed(ctx, x)?;
        self.body.backward(ctx, normed.as_ref().unwrap_or(x), saved.body, dy)
    }

    /// norm_in(x); none when that is x itself.
    fn normed(&self, ctx: &Context, x: &Tensor) -> Result<Option<Tensor>> {
        let room = self.body.room(ctx, x);
        self.norm_in.as_ref().map(|norm| norm.forward_with_room(x, room)).transpose()
    }
}

impl<Body: Layer> Layer for Sublayer<Body> {
    type Saved = SublayerSaved<Body::Saved>;

    fn forward(&self, ctx: &Context, x: &Tensor) -> Result<(Tensor, Self::Saved)> {
        let (out, body) = self.body.forward(ctx, self.normed(ctx, x)?.as_ref().unwrap_or(x))?;
        match &self.norm_out {
            Some(norm) => Ok((norm.forward(&out)?, SublayerSaved { body, body_out: Some(out) })),
            None => Ok((out, SublayerSaved { body, body_out: None })),
        }
    }

    fn recompute(&self, ctx: &Context, x: &Tensor) -> Result<Self::Saved> {
        if self.norm_out.is_some() {
            return Ok(self.forward(ctx, x)?.1);
        }
        let body = self.body.recompute(ctx, self.normed(ctx, x)?.as_ref().unwrap_or(x))?;
        Ok(SublayerSaved { body, body_out: None })
    }

    fn backward(&mut self, ctx: &Context, x: &Tensor, saved: Self::Saved, dy: Tensor) -> Result<Tensor> {
        let dx = self.body_backward(ctx, x, saved, dy)?;
        match &mut self.norm_in {
            Some(norm) => norm.backward(x, dx),
            None => Ok(dx),
        }
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        let before = self.norm_in.iter_mut().flat_map(Norm::parameters);
        let after = self.norm_out.iter_mut().flat_map(Norm::parameters);
        before.chain(self.body.parameters()).chain(after).collect()
    }
}

/// The first `cols` columns, copied if there are more.
pub(crate) fn without_room(dy: Tensor, cols: usize) -> Result<Tensor> {
    if dy.cols() == cols {
        return Ok(dy);
    }
    let mut own = dy.empty_like(dy.rows(), cols)?;
    own.write_block((0, 0), &dy, (0..dy.rows(), 0..cols))?;
    Ok(own)
}

/// One layer of a decoder.
pub struct Block {
    /// Before both sublayers at once, of a parallel block.
    pub norm_in: Option<Norm>,
    /// The first sublayer.
    pub attention: Sublayer<Attention>,
    /// The second sublayer.
    pub mlp: Sublayer<FeedForward>,
    /// How they join the residual stream.
    pub residual: Residual,
    /// s
    pub residual_scale: f64,
}

/// What [`Block`]'s backward reads.
pub struct BlockSaved {
    attention: <Sublayer<Attention> as Layer>::Saved,
    /// (N, C): what the mlp read, when that was not x.
    mid: Option<Tensor>,
    mlp: <Sublayer<FeedForward> as Layer>::Saved,
}

impl SavedTensors for BlockSaved {
    fn tensors(&mut self) -> Vec<&mut Tensor> {
        let sublayers = self.attention.tensors().into_iter().chain(self.mlp.tensors());
        sublayers.chain(&mut self.mid).collect()
    }
}

impl Block {
    /// What the sublayers read, where one norm stands before both.
    fn normed(&self, x: &Tensor) -> Result<Option<Tensor>> {
        self.norm_in.as_ref().map(|norm| norm.forward(x)).transpose()
    }

    /// branch·s + x, in the branch's memory.
    fn join(&self, mut branch: Tensor, x: &Tensor) -> Result<Tensor> {
        if self.residual_scale != 1.0 {
            branch.scale(self.residual_scale)?;
        }
        branch.add_scaled(1.0, x)?;
        Ok(branch)
    }

    /// The gradient that reaches a branch, with the room that the branch wants.
    fn branch_gradient(&self, dy: &Tensor, room: usize) -> Result<Tensor> {
        let (rows, cols) = dy.shape();
        let mut branch = match room {
            0 => dy.try_clone()?,
            _ => dy.empty_like(rows, cols + room)?,
        };
        if room > 0 {
            branch.write_block((0, 0), dy, (0..rows, 0..cols))?;
        }
        if self.residual_scale != 1.0 {
            branch.scale(self.residual_scale)?;
        }
        Ok(branch)
    }

    /// Columns that gradients have beside their own where kernels join a branch with the residual stream; else none.
    fn joined_room(&self, ctx: &Context, x: &Tensor) -> Option<usize> {
        let (attention, mlp) = (&self.attention, &self.mlp);
        let room = (attention.body.gradient_room(ctx, x), mlp.body.gradient_room(ctx, x));
        let between = [(&attention.norm_in, &attention.norm_out), (&mlp.norm_in, &mlp.norm_out)]
            .map(|(before, after)| before.is_some() && after.is_none());
        let plain =
            self.residual == Residual::Sequential && self.residual_scale == 1.0 && between == [true, true];
        (x.gpu().is_some() && plain && room.0 > 0 && room.1 > 0).then(|| room.0.max(room.1))
    }

    fn parallel_backward(
        &mut self,
        ctx: &Context,
        x: &Tensor,
        saved: BlockSaved,
        dy: Tensor,
    ) -> Result<Tensor> {
        let normed = self.normed(x)?;
        let input = normed.as_ref().unwrap_or(x);
        let room = (self.attention.body.gradient_room(ctx, x), self.mlp.body.gradient_room(ctx, x));
        let branch = self.branch_gradient(&dy, room.1)?;
        let mut dx = self.mlp.backward(ctx, input, saved.mlp, branch)?;
        let branch = self.branch_gradient(&dy, room.0)?;
        dx.add_scaled(1.0, &self.attention.backward(ctx, input, saved.attention, branch)?)?;
        if let Some(norm) = &mut self.norm_in {
            dx = norm.backward(x, dx)?;
        }
        dx.add_scaled(1.0, &dy)?;
        Ok(dx)
    }

    /// Whether [`Block::step_row`] takes rows such as this.
    pub fn takes_row(&self, ctx: &Context, like: &Tensor) -> bool {
        let (attention, mlp) = (&self.attention, &self.mlp);
        self.residual == Residual::Sequential
            && (attention.norm_in.is_some(), attention.norm_out.is_none()) == (true, true)
            && (mlp.norm_in.is_some(), mlp.norm_out.is_none()) == (true, true)
            && attention.body.takes_row(ctx, like)
            && mlp.body.takes_row(ctx, like)
    }

    /// Forward of the token at `ctx.row` on a GPU.
    ///
    /// # Errors
    /// When [`Block::takes_row`] says no.
    pub fn step_row(&self, ctx: &Context, x: &Tensor, cache: &KeyValues) -> Result<Tensor> {
        let (Some(before_attention), Some(before_mlp)) = (&self.attention.norm_in, &self.mlp.norm_in) else {
            return Err(Error::msg("no kernel takes this block row by row"));
        };
        let mid = self.attention.body.step_row(ctx, x, before_attention, cache, self.residual_scale)?;
        self.mlp.body.step_row(ctx, &mid, before_mlp, self.residual_scale)
    }

    /// Forward of further tokens of one sequence.
    ///
    /// # Errors
    /// When shapes don't fit.
    pub fn step(&self, ctx: &Context, x: &Tensor, cache: &mut KeyValues) -> Result<Tensor> {
        let shared = self.normed(x)?;
        let input = shared.as_ref().unwrap_or(x);
        let normed = self.attention.normed(ctx, input)?;
        let mut branch = self.attention.body.step(ctx, normed.as_ref().unwrap_or(input), cache)?;
        if let Some(norm) = &self.attention.norm_out {
            branch = norm.forward(&branch)?;
        }
        let mid = self.join(branch, x)?;
        let mlp_input = if self.residual == Residual::Parallel { input } else { &mid };
        let (branch, _) = self.mlp.forward(ctx, mlp_input)?;
        self.join(branch, &mid)
    }
}

impl Layer for Block {
    type Saved = BlockSaved;

    fn forward(&self, ctx: &Context, x: &Tensor) -> Result<(Tensor, BlockSaved)> {
        let normed = self.normed(x)?;
        let input = normed.as_ref().unwrap_or(x);
        let (branch, attention) = self.attention.forward(ctx, input)?;
        let mid = self.join(branch, x)?;
        let mlp_input = if self.residual == Residual::Parallel { input } else { &mid };
        let (branch, mlp) = self.mlp.forward(ctx, mlp_input)?;
        let y = self.join(branch, &mid)?;
        let mid = (self.residual == Residual::Sequential).then_some(mid);
        Ok((y, BlockSaved { attention, mid, mlp }))
    }

    /// Stops at what backward needs: without the mlp's last product.
    fn recompute(&self, ctx: &Context, x: &Tensor) -> Result<BlockSaved> {
        if self.residual == Residual::Parallel {
            let normed = self.normed(x)?;
            let input = normed.as_ref().unwrap_or(x);
            let (attention, mlp) = (self.attention.recompute(ctx, input)?, self.mlp.recompute(ctx, input)?);
            return Ok(BlockSaved { attention, mid: None, mlp });
        }
        let (branch, attention) = self.attention.forward(ctx, x)?;
        let mid = self.join(branch, x)?;
        let mlp = self.mlp.recompute(ctx, &mid)?;
        Ok(BlockSaved { attention, mid: Some(mid), mlp })
    }

    fn backward(&mut self, ctx: &Context, x: &Tensor, saved: BlockSaved, dy: Tensor) -> Result<Tensor> {
        if let Some(room) = self.joined_room(ctx, x) {
            let dy = if dy.cols() < x.cols() + room { self.branch_gradient(&dy, room)? } else { dy };
            let mid = saved.mid.as_ref().unwrap_or(x);
            let dmid = self.mlp.backward_joined(ctx, mid, saved.mlp, &dy, room)?;
            drop(dy);
            return self.attention.backward_joined(ctx, x, saved.attention, &dmid, room);
        }
        let dy = without_room(dy, x.cols())?;
        if self.residual == Residual::Parallel {
            return self.parallel_backward(ctx, x, saved, dy);
        }
        let mlp_input = saved.mid.as_ref().unwrap_or(x);
        let room = (self.attention.body.gradient_room(ctx, x), self.mlp.body.gradient_room(ctx, x));
        let branch = self.branch_gradient(&dy, room.1)?;
        let mut dx = self.mlp.backward(ctx, mlp_input, saved.mlp, branch)?;
        dx.add_scaled(1.0, &dy)?;
        let branch = self.branch_gradient(&dx, room.0)?;
        dx.add_scaled(1.0, &self.attention.backward(ctx, x, saved.attention, branch)?)?;
        Ok(dx)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        let norm = self.norm_in.iter_mut().flat_map(Norm::parameters);
        norm.chain(self.attention.parameters()).chain(self.mlp.parameters()).collect()
    }
}
