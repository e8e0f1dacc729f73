package rpc

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// Message is one gRPC message as its bytes. It owns a reference to its buffers until it is sent or
// freed.
type Message struct {
	Data mem.BufferSlice
}

// Free gives the buffers back. A frame may be freed twice.
func (f *Message) Free() {
	f.Data.Free()
	f.Data = nil
}

// Edit replaces the message by what fn makes of it. fn gets the message in one piece, must not
// retain it, and returns the very slice it got to leave it as it is.
func (f *Message) Edit(fn func([]byte) ([]byte, error)) error {
	var msg []byte
	if len(f.Data) == 1 {
		msg = f.Data[0].ReadOnlyData()
	} else if len(f.Data) > 1 {
		whole := f.Data.MaterializeToBuffer(Buffers)
		f.Data.Free()
		f.Data = mem.BufferSlice{whole}
		msg = whole.ReadOnlyData()
	}
	out, err := fn(msg)
	if err != nil {
		return err
	}
	if len(out) == len(msg) && (len(out) == 0 || &out[0] == &msg[0]) {
		return nil
	}
	f.Data.Free()
	f.Data = mem.BufferSlice{mem.SliceBuffer(out)}
	return nil
}

// Replace is edit with an fn that may overwrite the message and return the front of it, or new
// bytes. After an error the frame is empty.
func (f *Message) Replace(fn func([]byte) ([]byte, error)) error {
	// The buffers that grpc hands out are not ours to write to.
	own := Buffers.Get(f.Data.Len())
	f.Data.CopyTo(*own)
	f.Free()
	out, err := replaced(own, len(*own), fn)
	if err == nil {
		f.Data = mem.BufferSlice{out}
	}
	return err
}

// replaced returns what fn makes of the first n bytes of own, which it takes over.
func replaced(own *[]byte, n int, fn func([]byte) ([]byte, error)) (mem.Buffer, error) {
	out, err := fn((*own)[:n:n])
	if err != nil {
		Buffers.Put(own)
		return nil, err
	}
	return BufferOf(own, out), nil
}

// BufferOf returns a buffer of out, which is the front of own or bytes of its own. It takes own
// over.
func BufferOf(own *[]byte, out []byte) mem.Buffer {
	if len(out) > 0 && &out[0] != &(*own)[0] {
		Buffers.Put(own)
		return mem.SliceBuffer(out)
	}
	// The whole goes back to the pool, to be cleared, when its front has been sent.
	whole := mem.NewBuffer(own, Buffers)
	defer whole.Free()
	return whole.Slice(0, len(out))
}

// PartSize is about how many bytes of a long message are replaced at a time: few enough to stay in
// the processor's cache until they are done with.
const PartSize = 64 << 10

// ReplaceParts is replace for an fn that takes a message in parts, each of whole fields: protobuf's
// messages can be cut between two fields and put together again.
func (f *Message) ReplaceParts(fn func([]byte) ([]byte, error)) error {
	if f.Data.Len() <= 2*PartSize {
		return f.Replace(fn)
	}
	in := f.Data.Reader()
	defer in.Close() //nolint:errcheck // never fails
	f.Free()         // the reader has references of its own, and drops each when it is read
	var out mem.BufferSlice
	var begun []byte // the front of a field whose rest is still to be read
	for size := PartSize; len(begun) > 0 || in.Remaining() > 0; {
		size = max(size, len(begun))
		own := Buffers.Get(min(size, len(begun)+in.Remaining()))
		n := copy(*own, begun)
		_, _ = in.Read((*own)[n:]) // never fails: so much is there
		whole, next := etcdwire.WholeFields(*own)
		if in.Remaining() == 0 || next < 0 {
			whole = len(*own) // what is wrong with it is for fn to say
		}
		if begun = append(begun[:0], (*own)[whole:]...); whole == 0 {
			Buffers.Put(own)
			size = max(2*size, next) // a field that is longer than the part
			continue
		}
		size = PartSize
		part, err := replaced(own, whole, fn)
		if err != nil {
			out.Free()
			return err
		}
		out = append(out, part)
	}
	f.Data = out
	return nil
}

// Codec moves frames without looking inside. Its name is protobuf's, because that is what the bytes
// are.
type Codec struct{}

var _ encoding.CodecV2 = Codec{}

// Marshal implements encoding.CodecV2. It hands the frame's buffers over and leaves the frame
// empty.
func (Codec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*Message)
	if !ok {
		return nil, fmt.Errorf("marshal %T: not a frame", v)
	}
	data := f.Data
	f.Data = nil
	return data, nil
}

// Unmarshal implements encoding.CodecV2. The frame keeps its own reference to the buffers.
func (Codec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*Message)
	if !ok {
		return fmt.Errorf("unmarshal into %T: not a frame", v)
	}
	f.Data.Free()
	data.Ref()
	f.Data = data
	return nil
}

// Name implements encoding.CodecV2.
func (Codec) Name() string { return "proto" }

// HeaderLength is that of the head of a gRPC message: a flag and four bytes of length.
const HeaderLength = 5

// Header is that of a message of n bytes. It is inlined, and needs no memory where it does not
// escape.
func Header(n int) []byte {
	return []byte{0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)} //nolint:gosec // the bytes of a number
}

// MessageOf makes a frame of a message: of protobuf's, or a frame already, which it takes over.
func MessageOf(m any) (*Message, error) {
	switch m := m.(type) {
	case *Message:
		f := &Message{Data: m.Data}
		m.Data = nil
		return f, nil
	case proto.Message:
		msg, err := Marshal(m)
		if err != nil {
			return nil, err
		}
		return NewMessage(msg), nil
	}
	return nil, fmt.Errorf("encode %T: not a message", m)
}

// Decode decodes the message into a protobuf's, or hands it over to a frame.
func (f *Message) Decode(into any) error {
	switch into := into.(type) {
	case *Message:
		into.Data, f.Data = f.Data, nil
		return nil
	case proto.Message:
		return Unmarshal(f.Data.Materialize(), into)
	}
	return fmt.Errorf("decode into %T: not a message", into)
}

// NewMessage returns a message of these bytes.
func NewMessage(msg []byte) *Message { return &Message{Data: mem.BufferSlice{mem.SliceBuffer(msg)}} }

// Unmarshal decodes a message. The error wraps [etcdwire.ErrMalformed].
func Unmarshal(msg []byte, into proto.Message) error {
	if err := proto.Unmarshal(msg, into); err != nil {
		return fmt.Errorf("%w: it cannot be decoded", etcdwire.ErrMalformed)
	}
	return nil
}

// Marshal encodes a message.
func Marshal(m proto.Message) ([]byte, error) {
	out, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", m, err)
	}
	return out, nil
}
