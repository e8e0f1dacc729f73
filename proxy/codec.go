package proxy

import (
	"context"
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
)

// frame is one gRPC message as its bytes. It owns a reference to its buffers until it is sent or freed.
type frame struct {
	data mem.BufferSlice
}

// free gives the buffers back. A frame may be freed twice.
func (f *frame) free() {
	f.data.Free()
	f.data = nil
}

// edit replaces the message by what fn makes of it. fn gets the message in one piece, must not retain it, and returns the very
// slice it got to leave it as it is.
func (f *frame) edit(ctx context.Context, fn func(context.Context, []byte) ([]byte, error)) error {
	var msg []byte
	if len(f.data) == 1 {
		msg = f.data[0].ReadOnlyData()
	} else if len(f.data) > 1 {
		whole := f.data.MaterializeToBuffer(buffers)
		f.data.Free()
		f.data = mem.BufferSlice{whole}
		msg = whole.ReadOnlyData()
	}
	out, err := fn(ctx, msg)
	if err != nil {
		return err
	}
	if len(out) == len(msg) && (len(out) == 0 || &out[0] == &msg[0]) {
		return nil
	}
	f.data.Free()
	f.data = mem.BufferSlice{mem.SliceBuffer(out)}
	return nil
}

// replace is edit with an fn that may overwrite the message and return the front of it, or new bytes. After an error the frame is empty.
func (f *frame) replace(ctx context.Context, fn func(context.Context, []byte) ([]byte, error)) error {
	// The buffers that grpc hands out are not ours to write to.
	own := buffers.Get(f.data.Len())
	f.data.CopyTo(*own)
	f.free()
	out, err := fn(ctx, *own)
	if err != nil {
		buffers.Put(own)
		return err
	}
	if len(out) > 0 && &out[0] != &(*own)[0] {
		buffers.Put(own)
		f.data = mem.BufferSlice{mem.SliceBuffer(out)}
		return nil
	}
	// The whole goes back to the pool, to be cleared, when its front has been sent.
	whole := mem.NewBuffer(own, buffers)
	f.data = mem.BufferSlice{whole.Slice(0, len(out))}
	whole.Free()
	return nil
}

// rawCodec moves frames without looking inside. Its name is protobuf's, because that is what the bytes are.
type rawCodec struct{}

var _ encoding.CodecV2 = rawCodec{}

// Marshal implements encoding.CodecV2. It hands the frame's buffers over and leaves the frame empty.
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*frame)
	if !ok {
		return nil, fmt.Errorf("marshal %T: not a frame", v)
	}
	data := f.data
	f.data = nil
	return data, nil
}

// Unmarshal implements encoding.CodecV2. The frame keeps its own reference to the buffers.
func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return fmt.Errorf("unmarshal into %T: not a frame", v)
	}
	f.data.Free()
	data.Ref()
	f.data = data
	return nil
}

// Name implements encoding.CodecV2.
func (rawCodec) Name() string { return "proto" }
